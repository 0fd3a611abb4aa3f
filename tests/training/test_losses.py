import math

import pytest
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, forward
from cactus_ray.bounds.interval import Box, ball, margins
from cactus_ray.config import CERTIFIED_LOSSES as NAMES
from cactus_ray.training.losses import CERTIFIED_LOSSES, RampRegularizer, Region, standard

IMAGE, LABEL = torch.tensor([[0.5, 0.25]]), torch.tensor([0])


def test_margin_and_losses_by_hand(tiny: tuple[Graph, Params]) -> None:
    # Around x = (0.5, 0.25), radius 0.1: fc1 has centre (0.25, 0.25), radius (0.2, 0.3), so boxes [0.05, 0.45] and
    # [-0.05, 0.55]; after ReLU [0.05, 0.45] and [0, 0.55]. Elided: logit 0 - logit 1 = 2 h0 - h1 + 0.5, lowest at
    # h = (0.05, 0.55): 0.1 - 0.55 + 0.5 = 0.05.
    graph, params = tiny
    region = Region(LABEL, ball(IMAGE, 0.1, (0.0, 1.0)))
    lower = margins(graph, params, region.ball, LABEL)
    torch.testing.assert_close(lower, torch.tensor([[0.0, 0.05]]))
    assert CERTIFIED_LOSSES["ibp"](graph, params, region).item() == pytest.approx(math.log(1 + math.exp(-0.05)), 1e-5)

    # SABR: box of radius 0.05 that a point in the corner (0.4, 0.35) pushes to the centre (0.45, 0.3). fc1: centre
    # (0.15, 0.2), radius (0.1, 0.15): [0.05, 0.25] and [0.05, 0.35]. Lowest 2 h0 - h1 + 0.5 = 0.1 - 0.35 + 0.5.
    small = Region(LABEL, region.ball, torch.tensor([[0.4, 0.35]]), 0.5)
    assert CERTIFIED_LOSSES["sabr"](graph, params, small).item() == pytest.approx(math.log(1 + math.exp(-0.25)), 1e-5)

    # Clean: h = (0.25, 0.25), logits (0.75, 0).
    clean = standard(graph, params, IMAGE, LABEL, {})
    assert clean.item() == pytest.approx(math.log(1 + math.exp(-0.75)), 1e-5)


def test_the_table_has_the_names_of_the_configuration() -> None:
    assert set(CERTIFIED_LOSSES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_at_epsilon_zero_every_certified_loss_is_the_cross_entropy(
    name: str, tiny: tuple[Graph, Params], generator: torch.Generator
) -> None:
    graph, params = tiny
    images, labels = torch.rand(20, 2, generator=generator), torch.randint(2, (20,), generator=generator)
    region = Region(labels, ball(images, 0.0, (0.0, 1.0)), images, 0.6)
    clean = standard(graph, params, images, labels, {})
    torch.testing.assert_close(CERTIFIED_LOSSES[name](graph, params, region), clean)


def test_ibp_is_an_upper_bound_of_the_loss_at_every_sampled_point(
    tiny: tuple[Graph, Params], generator: torch.Generator
) -> None:
    graph, params = tiny
    region = ball(IMAGE, 0.2, (0.0, 1.0))
    bound = CERTIFIED_LOSSES["ibp"](graph, params, Region(LABEL, region))
    points = torch.lerp(region.lower, region.upper, torch.rand(2000, 2, generator=generator))
    losses = torch.nn.functional.cross_entropy(forward(graph, params, points), LABEL.expand(2000), reduction="none")
    assert losses.max() <= bound + 1e-6


def test_sabr_without_a_point_is_refused(tiny: tuple[Graph, Params]) -> None:
    with pytest.raises(ValueError, match="point"):
        CERTIFIED_LOSSES["sabr"](*tiny, Region(LABEL, ball(IMAGE, 0.1, (0.0, 1.0))))


def test_region_first_cuts_everything() -> None:
    images, labels = torch.rand(6, 2), torch.arange(6)
    part = Region(labels, ball(images, 0.1, (0.0, 1.0)), images, 0.4).first(2)
    assert part.point is not None
    assert [len(t) for t in (part.labels, part.ball.center, part.ball.radius, part.point)] == [2, 2, 2, 2]
    assert part.box_ratio == 0.4


def test_box_uses_clean_statistics_and_sends_gradients_into_them(generator: torch.Generator) -> None:
    nodes = (
        Node("input", "input"),
        Node("fc1", "linear", ("input",)),
        Node("bn", "batch_norm", ("fc1",), {"eps": 1e-5, "momentum": 0.1}),
        Node("relu", "relu", ("bn",)),
        Node("fc2", "linear", ("relu",)),
    )
    graph = Graph(nodes, (3,))
    params = {
        "fc1.weight": torch.randn(4, 3, generator=generator).requires_grad_(),
        "bn.weight": torch.ones(4), "bn.bias": torch.zeros(4),
        "bn.running_mean": torch.full((4,), 9.0), "bn.running_var": torch.full((4,), 9.0),
        "fc2.weight": torch.randn(2, 4, generator=generator),
    }  # fmt: skip
    images, labels = torch.rand(16, 3, generator=generator), torch.randint(2, (16,), generator=generator)
    statistics: Statistics = {}
    clean = standard(graph, params, images, labels, statistics)
    exact = Region(labels, Box(images, torch.zeros_like(images)))
    loss = CERTIFIED_LOSSES["ibp"](graph, params, exact, statistics=statistics)
    torch.testing.assert_close(loss, clean)  # not those of the running mean 9
    (through,) = torch.autograd.grad(loss, params["fc1.weight"], retain_graph=True)
    detached = {k: (m.detach(), v.detach()) for k, (m, v) in statistics.items()}
    without = CERTIFIED_LOSSES["ibp"](graph, params, exact, statistics=detached)
    (direct,) = torch.autograd.grad(without, params["fc1.weight"])
    assert not torch.allclose(through, direct)


def _seen(center: Tensor, radius: Tensor, input_radius: float) -> RampRegularizer:
    visitor = RampRegularizer()
    visitor(Node("input", "input"), Box(torch.zeros(1, 2), torch.full((1, 2), input_radius)))
    visitor(Node("fc", "linear", ("input",)), Box(center, radius))
    visitor(Node("relu", "relu", ("fc",)), Box(center, radius))
    return visitor


def test_regularizer_by_hand() -> None:
    # Radius grows from 0.1 to 0.4: ratio 0.25, shortfall (0.5 - 0.25) / 0.5 = 0.5. Active centre 1, inactive -4: ratio
    # of means 0.25 -> 0.5. Mean -1.5, deviations 6.25 each: ratio 1 -> 0.
    center, radius = torch.tensor([[1.0, -4.0]]), torch.full((1, 2), 0.4)
    assert _seen(center, radius, 0.1).value().item() == pytest.approx(1.0)


def test_regularizer_without_stable_neurons_is_finite_with_finite_gradient() -> None:
    center = torch.tensor([[0.1, -0.1]], requires_grad=True)
    radius = torch.full((1, 2), 0.4, requires_grad=True)
    value = _seen(center, radius, 0.4).value()
    assert value.item() == 0.0
    gradients = torch.autograd.grad(value, (center, radius), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
