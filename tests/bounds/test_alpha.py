"""Optimised slopes: never outside what the network computes, never looser than CROWN, and red on planted faults."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from containment import DOMAIN, SLACK, points_of, steered_points
from small_networks import KINDS, SHAPE, network
from torch import Tensor

from cactus_ray.bounds import alpha, ascent, interval, linear, slopes
from cactus_ray.bounds.alpha import Margins, Search, alpha_margins
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.leaves import leaf_multipliers
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.splits import Network, Region

EVERYTHING = Search(iterations=12, target=torch.inf)


def case(kind: str, seed: int = 0, epsilon: float = 0.1, count: int = 3) -> tuple[Graph, Params, Tensor, Box, Tensor]:
    structure, params = network(kind, seed)
    params = {k: v.float().double() for k, v in params.items()}  # deployed values are float32
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return structure, params, images, interval.ball(images, epsilon, DOMAIN), torch.arange(count) % 3


def alone(
    structure: Graph, params: Params, box: Box, labels: Tensor, how: Search = EVERYTHING, **options: Any
) -> Margins:
    """Alpha's margins without interval's."""
    nothing = torch.full((len(labels), 3), -torch.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    return alpha_margins(structure, params, box, labels, known=nothing, how=how, **options)


def violations(kind: str, *, seed: int = 0, epsilon: float = 0.1, rounding: bool = False) -> list[str]:
    """What alpha's margins and boxes get wrong at sampled points."""
    structure, params, images, box, labels = case(kind, seed, epsilon)
    charges = Rounding.of(structure, params, "float32") if rounding else None
    margins = alone(structure, params, box, labels, rounding=charges)
    single = {k: v.float() for k, v in params.items()}
    boxes = linear.intermediate_boxes(structure, params, box, Effort(), charges)
    boxes = alpha.tightened_boxes(Network(structure, params, single, charges), boxes)
    found = []
    for point in [*points_of(images, epsilon, 10, seed), *steered_points(structure, params, images, epsilon, 2, seed)]:
        values: dict[str, Tensor] = {}
        logits = forward(structure, params, point, visit=lambda n, y, values=values: values.__setitem__(n.name, y))
        for name, claimed in boxes.items():
            outside = torch.maximum(claimed.lower - values[name], values[name] - claimed.upper)
            if not bool((outside <= SLACK).all()):
                found.append(f"node {name} by {outside.max():.3g}")
        above = margins.lower - (logits.gather(1, labels[:, None]) - logits)
        if not bool((above.scatter(1, labels[:, None], 0.0) <= SLACK).all()):
            found.append(f"margin by {above.max():.3g}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_contains_what_the_network_computes(kind: str) -> None:
    assert violations(kind) == []


def test_contains_what_the_network_computes_with_rounding_charged() -> None:
    for kind in ("deep conv", "residual", "leaky", "max pool"):
        assert violations(kind, seed=1, rounding=True) == []


@pytest.mark.parametrize("kind", KINDS)
def test_never_looser_than_crown_and_tighter_on_average(kind: str) -> None:
    structure, params, _, box, labels = case(kind)
    nothing = torch.full((3, 3), -torch.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    crown = linear.crown_margins(structure, params, box, labels, known=nothing)
    found = alone(structure, params, box, labels).lower
    assert bool((found >= crown - 1e-9).all())
    assert float(found.mean()) > float(crown.mean())


def test_deterministic_and_independent_of_neighbours() -> None:
    structure, params, _, box, labels = case("deep conv")
    together = alone(structure, params, box, labels).lower
    assert bool((alone(structure, params, box, labels).lower == together).all())
    single = [
        alone(structure, params, Box(box.center[i, None], box.radius[i, None]), labels[i, None]).lower for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(single), together, rtol=1e-4, atol=1e-4)  # the search is one of float32


def test_nothing_is_searched_for_what_is_known() -> None:
    structure, params, _, box, labels = case("mlp")
    known = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
    found = alpha_margins(structure, params, box, labels, known=known)
    assert bool((found.lower >= known).all())
    assert set(zip(found.sample.tolist(), found.other.tolist(), strict=True)) <= {(2, 1)}


def test_rows_that_are_proved_leave_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, params, _, box, labels = case("mlp", epsilon=0.05)
    seen: list[int] = []
    true = slopes.Climb.bound

    def watch(climb: slopes.Climb) -> Tensor:
        if climb.relaxed.last == structure.output.name:
            seen.append(len(climb.rows.coefficients))
        return true(climb)

    monkeypatch.setattr(slopes.Climb, "bound", watch)
    alone(structure, params, box, labels, Search(iterations=12, target=-2.0))
    assert seen[0] == 6
    assert min(seen) < 6


def test_a_deadline_gives_crowns_bounds() -> None:
    structure, params, _, box, labels = case("deep conv")
    late = alone(structure, params, box, labels, Search(deadline=0.0), effort=Effort(deadline=0.0)).lower
    over_ibp = linear.crown_margins(
        structure, params, box, labels, known=torch.full_like(late, -torch.inf), effort=Effort(intermediate="ibp")
    )
    others = torch.arange(3) != labels[:, None]
    torch.testing.assert_close(late[others], over_ibp[others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_weights_prove_nothing(value: float) -> None:
    for kind in ("mlp", "conv", "max pool"):
        structure, params, _, box, labels = case(kind)
        for name in params:
            broken = {k: v.clone() for k, v in params.items()}
            broken[name].view(-1)[0] = value
            lower = alone(structure, broken, box, labels).lower
            good = torch.isfinite(lower) & (lower > 0)
            assert not bool(good.scatter(1, labels[:, None], True).all(1).any()), (kind, name)


def test_slopes_move_from_the_ends_and_stay_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's clamp has gradient 0 at its ends, where slopes start: they are projected instead."""
    moved: list[float] = []
    least: list[float] = []
    true: Callable[..., None] = slopes.FreeRelu.climb

    def watch(relu: Any, *arguments: Any) -> None:
        before = relu.alpha.detach().clone()
        true(relu, *arguments)
        after = relu.alpha.detach()
        assert bool(((after >= relu.least) & (after <= 1)).all())
        moved.append(float((after - before).abs().max()))
        least.append(relu.least)

    monkeypatch.setattr(slopes.FreeRelu, "climb", watch)
    for kind, slope in (("deep conv", 0.0), ("leaky", 0.1)):
        structure, params, _, box, labels = case(kind)
        alone(structure, params, box, labels)
        assert max(moved) > 0.1
        assert max(least) >= slope
        moved.clear()


# --- planted faults --------------------------------------------------------------------------------------------------


def test_slopes_outside_their_range_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Region.at
    monkeypatch.setattr(Region, "at", lambda region, a, b, *rest: true(region, 2 * a - 0.5, b, *rest))
    assert any(violations(kind) for kind in ("mlp", "deep conv"))


def test_slopes_outside_their_range_inside_the_network_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = alpha.with_slopes
    monkeypatch.setattr(alpha, "with_slopes", lambda r, own: true(r, {k: 2 * v - 0.5 for k, v in own.items()}))
    assert any("node" in line for kind in ("mlp", "deep conv") for line in violations(kind))


def test_bounds_of_other_neurons_inside_the_network_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = alpha.with_slopes

    class Mixed:
        def __init__(self, relaxed: linear.Relaxed, own: dict[str, Tensor]) -> None:
            self.relaxed = true(relaxed, own)

        def lower_bounds(self, rows: Any) -> Tensor:
            return self.relaxed.lower_bounds(rows).roll(1, 1)

    monkeypatch.setattr(alpha, "with_slopes", Mixed)
    assert any("node" in line for kind in ("mlp", "deep conv") for line in violations(kind))


def test_a_bound_that_is_not_taken_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes of one problem with the bound of another."""
    true = ascent.decide

    def mixed(region: Region, *variables: Tensor) -> Any:
        found = true(region, *variables)
        return ascent.Found(found.lower.roll(1), *[getattr(found, n) for n in ascent.Found.__slots__[1:]])

    monkeypatch.setattr(ascent, "decide", mixed)
    assert any("margin" in line for kind in KINDS for line in violations(kind))


def test_multipliers_of_a_program_without_constraints_are_zero() -> None:
    structure, params, _, box, labels = case("mlp")
    margins = alone(structure, params, box, labels)
    some = alpha.form_problems(alpha.MarginForms(labels, 3), margins.sample, margins.other, margins.index)
    multipliers, _, points = leaf_multipliers(Region.of(margins.root, some))
    assert not bool(multipliers.any())
    inside = (points >= box.lower[margins.sample] - SLACK) & (points <= box.upper[margins.sample] + SLACK)
    assert bool(inside.all())
