"""Slopes of every form: the gradient written by hand is the bound's, and steps stay inside what is sound."""

from dataclasses import replace

import pytest
import torch
from containment import DOMAIN
from small_networks import KINDS, SHAPE, network

from cactus_ray.bounds import interval, linear, slopes
from cactus_ray.bounds.graph import slope_of
from cactus_ray.bounds.linear import Relaxed
from cactus_ray.bounds.relaxation import Relaxation, ReluRelaxation
from cactus_ray.bounds.rows import Rows, unit_rows
from cactus_ray.bounds.slopes import Climb, FreeRelu, least_slope, own_slopes, rates, with_slopes


def subject(kind: str, last: str | None = None) -> tuple[Relaxed, Rows]:
    """A network relaxed in float64, and forms over neurons of its output or of the last node that a ReLU reads."""
    graph, params = network(kind, 0)
    params = {k: v.float().double() for k, v in params.items()}
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes = linear.intermediate_boxes(graph, params, interval.ball(images, 0.1, DOMAIN))
    last = graph.output.name if last is None else last
    shape = graph.shapes(params)[last]
    index = torch.arange(3).expand(2, -1)
    return Relaxed.on(graph, params, boxes, last), unit_rows(index, tuple(shape), torch.float64).with_negatives()


def inner(kind: str) -> str:
    """The node that the network's last ReLU reads."""
    graph, _ = network(kind, 0)
    return [node for node in graph.nodes if node.op in ("relu", "leaky_relu")][-1].inputs[0]


def climb_of(relaxed: Relaxed, rows: Rows) -> Climb:
    """With slopes at random places, in float64."""
    generator = torch.Generator().manual_seed(1)
    free: dict[str, Relaxation] = dict(relaxed.relaxations)
    for name, r in relaxed.relaxations.items():
        if isinstance(r, ReluRelaxation):
            moving = (r.lower_slope != r.upper_slope).double()
            drawn = torch.rand(r.lower_slope.shape, generator=generator, dtype=torch.float64)
            start = torch.where(moving > 0, 0.2 + 0.6 * drawn, r.lower_slope)
            free[name] = FreeRelu(start, r.upper_slope, r.intercept, moving, least_slope(slope_of(relaxed.graph[name])))
    return Climb(replace(relaxed, relaxations=free), rows)


@pytest.mark.parametrize("inside", [False, True], ids=["output", "inner node"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_bound(kind: str, inside: bool) -> None:
    climb = climb_of(*subject(kind, inner(kind) if inside else None))
    bound = climb.bound().sum()
    relus = list(climb.relus().values())
    alphas = [relu.alpha for relu in relus if relu.alpha is not None]
    if not alphas:
        pytest.skip("no ReLU before the node")
    gradients = torch.autograd.grad(bound, alphas)
    generator = torch.Generator().manual_seed(2)
    # away from where the slopes are free, the bound may move and the variable is not one
    moves = [
        torch.randn(a.shape, generator=generator, dtype=a.dtype).masked_fill(relu.placed[2], 0.0)
        for a, relu in zip(alphas, relus, strict=True)
        if relu.placed is not None
    ]
    size, values = 1e-7, []
    for sign in (1, -1):
        for alpha, move in zip(alphas, moves, strict=True):
            alpha.data += sign * size * move
        values.append(float(climb.bound().detach().sum()))
        for alpha, move in zip(alphas, moves, strict=True):
            alpha.data -= sign * size * move
    slope = sum(float((g * m).sum()) for g, m in zip(gradients, moves, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * size), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_step_the_bound_is_crowns(kind: str) -> None:
    relaxed, rows = subject(kind, inner(kind))
    single = {k: v.float() for k, v in relaxed.params.items()}
    climb = Climb(slopes._free(relaxed, single), Rows(rows.coefficients.float(), rows.origin))
    crown = relaxed.lower_bounds(rows)
    torch.testing.assert_close(climb.bound().double(), crown, rtol=1e-4, atol=1e-4)
    own = {name: relu.alpha.detach() for name, relu in climb.relus().items() if relu.alpha is not None}
    torch.testing.assert_close(with_slopes(relaxed, own).lower_bounds(rows), crown, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_raise_bounds(kind: str) -> None:
    relaxed, rows = subject(kind)
    single = {k: v.float() for k, v in relaxed.params.items()}
    found = with_slopes(relaxed, own_slopes(relaxed, single, rows, 12)).lower_bounds(rows)
    assert float(found.detach().mean()) > float(relaxed.lower_bounds(rows).mean())


def test_steps_fall_and_are_one_fewer_than_bounds() -> None:
    for iterations in (1, 2, 5, 20):
        steps = rates(iterations, 0.5)
        assert len(steps) == iterations - 1
        assert steps == sorted(steps, reverse=True)
        assert all(0.5 >= step > 0.5 / (iterations + 1) for step in steps)


def test_the_least_slope_is_sound_in_float64() -> None:
    assert least_slope(0.0) == 0.0
    for slope in (0.01, 0.1, 0.2, 0.3):
        assert slope <= least_slope(slope) <= slope * (1 + 1e-6)


def test_slopes_that_never_moved_are_sound_in_float64() -> None:
    start, one = torch.full((1, 3), 0.01), torch.ones(1, 3)  # the nearest float32 number is smaller
    assert bool((start.double() < 0.01).all())
    relu = FreeRelu(start, one, one, one, least_slope(0.01))
    relu.pull(Rows(torch.ones(1, 2, 3)), (3,))
    assert relu.alpha is not None
    assert bool((relu.alpha.double() >= 0.01).all())
