import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import ball
from cactus_ray.training.attacks import pgd, small_box


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.6), st.floats(0.01, 1.0))
def test_sabr_box_lies_in_ball_and_domain(seed: int, epsilon: float, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    images[0] = 0.0
    images[1] = 1.0
    region = ball(images, epsilon, (0.0, 1.0))
    point = torch.lerp(region.lower, region.upper, torch.rand(images.shape, generator=generator, dtype=torch.float64))
    box = small_box(region, point, ratio)
    assert (box.lower >= region.lower - 1e-12).all()
    assert (box.upper <= region.upper + 1e-12).all()
    assert box.lower.min() >= -1e-12
    assert box.upper.max() <= 1 + 1e-12
    torch.testing.assert_close(box.radius, ratio * (region.upper - region.lower) / 2)
    whole = (box.lower <= point + 1e-12) & (point <= box.upper + 1e-12)
    assert whole.all()  # the point itself stays inside its box


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("step_size", [0.05, 10.0])
def test_attack_never_leaves_ball_and_domain(
    tiny: tuple[Graph, Params], generator: torch.Generator, steps: int, step_size: float
) -> None:
    graph, params = tiny
    images, labels = torch.rand(50, 2, generator=generator), torch.randint(2, (50,), generator=generator)
    region = ball(images, 0.3, (0.0, 1.0))
    start = torch.rand(images.shape, generator=generator)
    x = pgd(graph, params, labels, region, steps=steps, step_size=step_size, start=start)
    assert (x >= region.lower).all()
    assert (x <= region.upper).all()
    assert x.min() >= 0
    assert x.max() <= 1
    assert not x.requires_grad


def test_attack_raises_the_loss_and_leaves_no_weight_gradient(
    tiny: tuple[Graph, Params], generator: torch.Generator
) -> None:
    graph, params = tiny
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    images, labels = torch.rand(200, 2, generator=generator), torch.randint(2, (200,), generator=generator)
    region = ball(images, 0.2, (0.0, 1.0))
    start = torch.rand(images.shape, generator=generator)
    x = pgd(graph, leaves, labels, region, steps=5, step_size=0.1, start=start)
    loss = torch.nn.functional.cross_entropy
    assert loss(forward(graph, params, x), labels) > loss(forward(graph, params, images), labels) + 0.05
    assert all(leaf.grad is None for leaf in leaves.values())
