"""Charges for rounding: the bounds' own is paid, and verdicts hold for what is deployed."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from containment import DOMAIN
from single_precision import doubled, exact
from small_networks import KINDS, SHAPE, network
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import VerificationSettings, verify
from cactus_ray.verification.verdict import Verdict

SETTINGS = VerificationSettings(attack_steps=4, restarts=1)


def wild(seed: int) -> tuple[Graph, Params, list[tuple[Tensor, Tensor]]]:
    """A ReLU network whose weights span 2^30 and cancel: float64 loses digits in it."""
    graph, params = trace(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (1, 2, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in params.items():
        size = 2.0 ** torch.randint(-15, 16, tensor.shape, generator=generator)
        params[name] = torch.randn(tensor.shape, generator=generator) * size
    return graph, params, [(params[f"{n.name}.weight"], params[f"{n.name}.bias"]) for n in graph.weighted()]


def too_high(arithmetic: str | None, radii: tuple[float, ...]) -> int:
    """How many margin bounds of wild networks are above the exact margin at a point of the ball."""
    count = 0
    for seed in range(25):
        graph, params, tensors = wild(seed)
        wide = doubled(params)
        charged = None if arithmetic is None else Rounding.of(graph, wide, arithmetic)
        image = torch.rand(1, 1, 2, 3, generator=torch.Generator().manual_seed(seed))
        for radius in radii:
            box, label = interval.ball(image.double(), radius, DOMAIN), torch.tensor([0])
            nothing = torch.full((1, 3), -torch.inf, dtype=torch.float64).scatter(1, label[:, None], 0.0)
            logits = [exact(tensors, x) for x in (image, box.lower, box.upper)]
            for lower in (
                interval.margins(graph, wide, box, label, rounding=charged),
                linear.crown_margins(graph, wide, box, label, known=nothing, rounding=charged),
            ):
                for j in (1, 2):
                    smallest = min(z[0] - z[j] for z in logits)
                    count += Fraction(float(lower[0, j])) > smallest
    return count


def test_bounds_are_below_the_exact_margins() -> None:
    assert too_high("real", (0.0,)) == 0
    assert too_high("float32", (0.0, 1e-3)) == 0


def test_bounds_without_charges_are_not() -> None:
    assert too_high(None, (0.0,)) > 10


def test_wider_than_real_and_hardly_for_the_bounds_own_rounding() -> None:
    for kind in (k for k in KINDS if "max pool" not in k):  # there ties, which rounding decides, choose the bound
        graph, wide = network(kind, 0)
        image = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        box, labels = interval.ball(image, 0.05, DOMAIN), torch.arange(3)
        plain, own, deployed = (
            linear.crown_margins(graph, wide, box, labels, rounding=a and Rounding.of(graph, wide, a))
            for a in (None, "real", "float32")
        )
        away = ~torch.eye(3, dtype=torch.bool)
        assert bool((own <= plain + 1e-15).all())
        assert bool((deployed < own)[away].all())
        assert float((plain - own).max()) < 1e-8
        assert float((plain - deployed).max()) < 1e-2


# --- verdicts --------------------------------------------------------------------------------------------------------


def treacherous() -> tuple[Graph, Params]:
    """Logit 0 is ahead by 0.5 everywhere; in float32 its terms of size 2^25 are rounded before they cancel."""
    first = [[2.0**25 + 4], [2.0**25 - 8], [12.0]]
    module = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    graph, params = trace(module, (1, 1, 1))
    one, two = graph.weighted()
    params[f"{one.name}.weight"], params[f"{one.name}.bias"] = torch.tensor(first), torch.zeros(3)
    params[f"{two.name}.weight"] = torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    params[f"{two.name}.bias"] = torch.tensor([0.5, 0.0])
    return graph, params


@pytest.mark.parametrize("bound", ["crown", "alpha", "branch"])
def test_a_network_that_only_real_numbers_classify_is_not_certified(bound: str) -> None:
    graph, params = treacherous()
    points = torch.rand(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert bool((forward(graph, params, points).argmax(1) == 1).any())
    assert all(exact_margin(graph, params, x) > 0 for x in points[:50])
    threat, settings = ThreatConfig(epsilon=1.0), replace(SETTINGS, bound=bound, seconds_per_sample=1e9)
    image, label = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    (real,) = verify(graph, params, image, label, [0], threat, replace(settings, arithmetic="real"))
    assert real.verdict is Verdict.CERTIFIED
    (deployed,) = verify(graph, params, image, label, [0], threat, replace(settings, arithmetic="float32"))
    assert deployed.verdict is Verdict.UNKNOWN


def exact_margin(graph: Graph, params: Params, x: Tensor) -> Fraction:
    tensors = [(params[f"{n.name}.weight"], params[f"{n.name}.bias"]) for n in graph.weighted()]
    logits = exact(tensors, x)
    return logits[0] - logits[1]
