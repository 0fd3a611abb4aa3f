"""Bounds contain sampled points; planted faults are found by the same check."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from containment import DOMAIN, points_of, violations
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import KINDS, SHAPE, network
from torch import Tensor

from cactus_ray.bounds import adjoint, graph, interval, linear, relaxation
from cactus_ray.bounds.graph import Node, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rows import Rows


def images_of(seed: int, count: int = 2) -> Tensor:
    """Images with many pixels at the ends of the domain, as real ones have."""
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise * 1.6 - 0.3).clamp(*DOMAIN)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0.001, 0.4), gain=st.floats(0.5, 3.0))
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_contain_sampled_points(kind: str, seed: int, epsilon: float, gain: float) -> None:
    structure, params = network(kind, seed, gain)
    assert violations(structure, params, images_of(seed), epsilon, count=10, seed=seed) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_ball_of_radius_zero_is_the_image(kind: str) -> None:
    structure, params = network(kind, 1)
    images, labels = images_of(1), torch.tensor([0, 1])
    logits = graph.forward(structure, params, images)
    true = logits.gather(1, labels[:, None]) - logits
    box = interval.ball(images, 0.0, DOMAIN)
    nothing = torch.full_like(true, -torch.inf).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(interval.margins(structure, params, box, labels), true)
    torch.testing.assert_close(linear.crown_margins(structure, params, box, labels, known=nothing), true)


# --- planted faults: each must be found ------------------------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]
true_step, true_relu, true_ball = interval.step, relaxation.relax_relu, interval.ball
true_affine, true_conv, true_pull = graph.batch_norm_affine, graph.conv2d, adjoint.pull_linear


def swapped_slopes(patch: pytest.MonkeyPatch) -> None:
    def relax(node: Node, box: Box) -> relaxation.Relaxation:
        right = true_relu(box)
        return relaxation.ReluRelaxation(right.upper_slope, right.lower_slope, right.intercept)

    patch.setattr(linear, "relax", relax)


def lower_line_above(patch: pytest.MonkeyPatch) -> None:
    def relax(node: Node, box: Box) -> relaxation.Relaxation:
        right = true_relu(box)
        return relaxation.ReluRelaxation(right.upper_slope, right.upper_slope, 0.5 * right.intercept)

    patch.setattr(linear, "relax", relax)


def no_split_by_sign(patch: pytest.MonkeyPatch) -> None:
    def pull(self: relaxation.ReluRelaxation, rows: Rows, shape: tuple[int, ...]) -> tuple[Rows, float]:
        return Rows(rows.coefficients * rows.over(self.lower_slope), rows.origin), 0.0

    patch.setattr(relaxation.ReluRelaxation, "pull", pull)


def signed_radius_of_linear(patch: pytest.MonkeyPatch) -> None:
    def step(node: Node, params: Params, inputs: list[Box], statistics: object = None) -> Box:
        right = true_step(node, params, inputs)
        if node.op != "linear":
            return right
        return Box(right.center, F.linear(inputs[0].radius, params[f"{node.name}.weight"]).clamp(min=0))

    patch.setattr(interval, "step", step)


def signed_radius_of_conv(patch: pytest.MonkeyPatch) -> None:
    def step(node: Node, params: Params, inputs: list[Box], statistics: object = None) -> Box:
        right = true_step(node, params, inputs)
        if node.op != "conv2d":
            return right
        radius = true_conv(node, inputs[0].radius, params[f"{node.name}.weight"], None)
        return Box(right.center, radius.clamp(min=0))

    patch.setattr(interval, "step", step)


def no_absolute_value_at_the_input(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "absolute", lambda rows: rows)


def wrong_padding_backward(patch: pytest.MonkeyPatch) -> None:
    """A padding that is off by one shifts the coefficients by a pixel."""

    def pull(node: Node, params: Params, rows: Rows, shape: tuple[int, ...]) -> tuple[Rows, Tensor | float]:
        right, constant = true_pull(node, params, rows, shape)
        if node.op != "conv2d":
            return right, constant
        if right.origin is not None:
            return Rows(right.coefficients, right.origin + 1), constant
        return Rows(torch.roll(right.coefficients, (1, 1), (3, 4))), constant

    patch.setattr(linear, "pull_linear", pull)


def wrong_padding_of_the_radius(patch: pytest.MonkeyPatch) -> None:
    def step(node: Node, params: Params, inputs: list[Box], statistics: object = None) -> Box:
        right = true_step(node, params, inputs)
        if node.op != "conv2d":
            return right
        return Box(right.center, torch.roll(right.radius, (1, 1), (2, 3)))

    patch.setattr(interval, "step", step)


def windows_keep_the_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "inside", lambda rows, shape: rows)


def unclipped_ball(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interval, "ball", lambda images, epsilon, domain: true_ball(images, epsilon, (-9.0, 9.0)))


def ball_clipped_too_much(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interval, "ball", lambda images, epsilon, domain: true_ball(images, epsilon, (0.1, 0.9)))


def stale_statistics(patch: pytest.MonkeyPatch) -> None:
    def affine(node: Node, params: Params, statistics: object = None) -> tuple[Tensor, Tensor]:
        fresh = {f"{node.name}.running_mean": 0.0, f"{node.name}.running_var": 1.0}
        return true_affine(node, params | {k: torch.full_like(params[k], v) for k, v in fresh.items()})

    for module in (interval, adjoint):
        patch.setattr(module, "batch_norm_affine", affine)


def stale_statistics_backward(patch: pytest.MonkeyPatch) -> None:
    def affine(node: Node, params: Params) -> tuple[Tensor, Tensor]:
        scale, shift = true_affine(node, params)
        return scale, torch.zeros_like(shift)

    patch.setattr(adjoint, "batch_norm_affine", affine)


def leaky_bounded_as_relu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(relaxation, "slope_of", lambda node: 0.0)


def forgotten_branch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "plus", lambda rows, other, shape: other.dense(shape))


def max_pool_of_centres(patch: pytest.MonkeyPatch) -> None:
    def step(node: Node, params: Params, inputs: list[Box], statistics: object = None) -> Box:
        right = true_step(node, params, inputs)
        if node.op != "max_pool2d":
            return right
        mean = F.avg_pool2d(inputs[0].radius, node["kernel"], node["stride"], node["padding"])
        return Box(graph.apply_node(node, params, [inputs[0].center]), mean)

    patch.setattr(interval, "step", step)


FAULTS: list[tuple[Fault, str]] = [
    (swapped_slopes, "conv"),
    (no_split_by_sign, "mlp"),
    (lower_line_above, "conv"),
    (signed_radius_of_linear, "mlp"),
    (signed_radius_of_conv, "stride and padding"),
    (no_absolute_value_at_the_input, "conv"),
    (wrong_padding_backward, "conv on conv"),
    (wrong_padding_of_the_radius, "stride and padding"),
    (windows_keep_the_padding, "conv on conv"),
    (unclipped_ball, "mlp"),
    (ball_clipped_too_much, "mlp"),
    (stale_statistics, "batch norm"),
    (stale_statistics_backward, "batch norm"),
    (forgotten_branch, "residual"),
    (leaky_bounded_as_relu, "leaky"),
    (max_pool_of_centres, "max pool"),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_planted_faults_are_found(fault: Fault, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(network(kind, seed), images_of(seed, 3)) for seed in range(3)]
    assert all(violations(*case, images, 0.1, count=10) == [] for case, images in cases)
    fault(monkeypatch)
    assert any(violations(*case, images, 0.1, count=10) for case, images in cases)


def test_points_stay_in_the_ball_and_the_domain() -> None:
    images = images_of(3)
    for point in points_of(images, 0.1, 5, 0):
        assert float((point - images).abs().max()) <= 0.1 + 1e-15
        assert float(point.min()) >= 0
        assert float(point.max()) <= 1
