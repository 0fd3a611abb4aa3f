"""Charges for rounding: float32 inference in any order of its sums stays inside, and faults show."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from containment import DOMAIN
from single_precision import ORDERS, Array, affine, doubled, evaluate, forward_order, layers
from small_networks import KINDS, SHAPE, network
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear, rounding
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rounding import ARITHMETICS, Rounding, gamma
from cactus_ray.bounds.trace import trace

UNIT = 2.0**-24


def single(kind: str, seed: int, gain: float = 1.5) -> tuple[Graph, Params]:
    """A random network whose tensors are float32 values."""
    graph, params = network(kind, seed, gain)
    return graph, {k: v.float() for k, v in params.items()}


def outside(graph: Graph, params: Params, image: Tensor, values: dict[str, Array], epsilon: float) -> list[str]:
    """Where float32 values of all nodes, computed at a point of the ball, leave what is claimed of float32."""
    wide = doubled(params)
    charged = Rounding.of(graph, wide, "float32")
    box, label = interval.ball(image[None].double(), epsilon, DOMAIN), torch.tensor([0])
    boxes: dict[str, Box] = {}
    interval.propagate(graph, wide, box, visit=lambda n, b: boxes.__setitem__(n.name, b), rounding=charged)
    found = []
    tight = linear.intermediate_boxes(graph, wide, box, rounding=charged)
    for engine, named in (("ibp", boxes), ("crown", tight)):
        for name, claimed in named.items():
            value = torch.from_numpy(values[name]).double().view_as(claimed.center)
            if not bool(((value >= claimed.lower) & (value <= claimed.upper)).all()):
                found.append(f"{engine}: {name}")
    logits = torch.from_numpy(values[graph.output.name]).double()[None]
    true = logits[:, :1] - logits
    nothing = torch.full_like(true, -torch.inf).scatter(1, label[:, None], 0.0)
    for engine, lower in (
        ("ibp", interval.margins(graph, wide, box, label, rounding=charged)),
        ("crown", linear.crown_margins(graph, wide, box, label, known=nothing, rounding=charged)),
    ):
        if not bool((lower <= true).all()):
            found.append(f"{engine}: margin")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_float32_in_any_order_stays_inside_its_charged_boxes(kind: str) -> None:
    """A ball of radius 0: nothing but the charge makes room for rounding."""
    graph, params = single(kind, 3)
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    for name, total in ORDERS.items():
        assert outside(graph, params, image, evaluate(graph, params, image, total), 0.0) == [], name
    visited: dict[str, Array] = {}
    forward(graph, params, image[None], visit=lambda n, y: visited.__setitem__(n.name, y.numpy().flatten()))
    assert outside(graph, params, image, visited, 0.0) == []
    point = (image + 0.05).clamp(0, 1)
    assert outside(graph, params, image, evaluate(graph, params, point, ORDERS["by size"]), 0.06) == []


def test_without_charges_the_boxes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test above: real arithmetic instead of float32's."""
    monkeypatch.setitem(ARITHMETICS, "float32", 0.0)
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    for kind in KINDS:
        graph, params = single(kind, 3)
        assert outside(graph, params, image, evaluate(graph, params, image, forward_order), 0.0), kind


def test_backward_bounds_that_are_not_charged_are_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened boxes alone do not make linear bounds right."""
    monkeypatch.setattr(Rounding, "charges", lambda self, graph, params, boxes: {})
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    graph, params = single("conv on conv", 3)
    found = [outside(graph, params, image, evaluate(graph, params, image, total), 0.0) for total in ORDERS.values()]
    assert any("crown: margin" in wrong for wrong in found)
    assert not any("ibp: margin" in wrong for wrong in found)


# --- the charge of one layer, where it is nearly attained ------------------------------------------------------------


def local_excess(params: Params, graph: Graph, image: Tensor, charges: dict[str, Tensor]) -> float:
    """How far the rounding of a linear layer, on inputs as computed, exceeds its charge; over all orders and layers."""
    worst = -math.inf
    for total in ORDERS.values():
        values = evaluate(graph, params, image, total)
        for node in graph.weighted():
            shape = graph.shapes(params)[node.inputs[0]]
            matrix, bias = affine(node, params, shape)
            terms = np.concatenate([matrix * values[node.inputs[0]].astype(np.float64)[None], bias[:, None]], 1)
            true = np.array([math.fsum(row) for row in terms])  # products of float32 are exact in float64
            error = np.abs(values[node.name].astype(np.float64) - true)
            worst = max(worst, float((error - charges[node.name].flatten().numpy()).max()))
    return worst


def charges_of(graph: Graph, params: Params, image: Tensor) -> dict[str, Tensor]:
    wide, boxes = doubled(params), {}
    charged = Rounding.of(graph, wide, "float32")
    box = interval.ball(image[None].double(), 0.0, DOMAIN)
    interval.propagate(graph, wide, box, visit=lambda n, b: boxes.__setitem__(n.name, b), rounding=charged)
    return charged.charges(graph, wide, boxes)


N = 200
HALF = float(np.float32(UNIT * 1.0001))
"""Just above half a unit in the last place of 1: added to 1 it counts nearly twice, every time."""


def creeping() -> tuple[Graph, Params, Tensor]:
    graph, params = layers(([[1.0] + [HALF] * (N - 1)] * 2, [0.0, 0.0]), inputs=N)
    return graph, params, torch.ones(1, 1, N)


def swallowed() -> tuple[Graph, Params, Tensor]:
    """A large bias to which ones are added that are lost."""
    graph, params = layers(([[1.0] * N] * 2, [2.0**24] * 2), inputs=N)
    return graph, params, torch.ones(1, 1, N)


def from_nothing() -> tuple[Graph, Params, Tensor]:
    """Neurons that are exactly 0 in real numbers and 1 in float32, and a layer that rounds when it adds them."""
    big = 2.0**24 + 2
    graph, params = layers(
        ([[big, 1.0, -big, -1.0]] * N, [0.0] * N), ([[1.0] + [HALF] * (N - 1)] * 2, [0.0, 0.0]), inputs=4
    )
    assert evaluate(graph, params, torch.ones(1, 1, 4), forward_order)[graph.weighted()[0].name].tolist() == [1.0] * N
    return graph, params, torch.ones(1, 1, 4)


@pytest.mark.parametrize("make", [creeping, swallowed, from_nothing])
def test_the_charge_covers_the_worst_that_sums_can_do(make: Callable[[], tuple[Graph, Params, Tensor]]) -> None:
    graph, params, image = make()
    assert local_excess(params, graph, image, charges_of(graph, params, image)) <= 0
    for total in ORDERS.values():
        assert outside(graph, params, image, evaluate(graph, params, image, total), 0.0) == []


def test_it_is_nearly_attained() -> None:
    graph, params, image = creeping()
    (node,) = graph.weighted()
    charge = float(charges_of(graph, params, image)[node.name][0, 0])
    assert local_excess(params, graph, image, {node.name: torch.zeros(1, 2)}) > 0.98 * charge
    assert charge == pytest.approx(gamma(N + 1, UNIT) * (1 + (N - 1) * HALF), rel=1e-6)


def test_fewer_roundings_than_terms_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    true = rounding._roundings
    monkeypatch.setattr(rounding, "_roundings", lambda node, params: true(node, params) * 9 // 10)
    graph, params, image = creeping()
    assert local_excess(params, graph, image, charges_of(graph, params, image)) > 0


@pytest.mark.parametrize("unit", [2.0**-25, 2.0**-53])
def test_a_smaller_unit_is_too_small(unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARITHMETICS, "float32", unit)
    graph, params, image = creeping()
    assert local_excess(params, graph, image, charges_of(graph, params, image)) > 0


def test_the_bias_must_be_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    true = rounding._constants
    monkeypatch.setattr(rounding, "_constants", lambda *arguments: replace(true(*arguments), offset=0.0))
    graph, params, image = swallowed()
    assert local_excess(params, graph, image, charges_of(graph, params, image)) > 0
    assert outside(graph, params, image, evaluate(graph, params, image, ORDERS["by size"]), 0.0)


def test_inputs_must_be_as_computed() -> None:
    """Charges that take |x| from boxes in real arithmetic miss what only rounding makes large."""
    graph, params, image = from_nothing()
    wide, boxes = doubled(params), {}
    box = interval.ball(image[None].double(), 0.0, DOMAIN)
    interval.propagate(graph, wide, box, visit=lambda n, b: boxes.__setitem__(n.name, b))
    charges = Rounding.of(graph, wide, "float32").charges(graph, wide, boxes)
    assert local_excess(params, graph, image, charges) > 0


def test_both_logits_are_charged_for_the_last_layer() -> None:
    """The deployed network rounds two logits and compares; the merged difference of weights would hide that."""
    graph, params = layers(([[2.0**12], [2.0**12]], [0.25, 0.0]), inputs=1)
    wide, image = doubled(params), torch.full((1, 1, 1, 1), 0.7)
    box, label = interval.ball(image.double(), 0.1, DOMAIN), torch.tensor([0])
    charged = Rounding.of(graph, wide, "float32")
    for margins in (interval.margins, linear.crown_margins):
        real, found = margins(graph, wide, box, label), margins(graph, wide, box, label, rounding=charged)
        assert float(real[0, 1]) == pytest.approx(0.25)
        assert float(real[0, 1] - found[0, 1]) >= 2 * gamma(2, UNIT) * 2.0**12 * 0.79


# --- chains that a runtime may compute as one ------------------------------------------------------------------------


def test_folded_batch_norm_and_fused_addition_stay_inside() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.norm(self.conv(x)) + x).flatten(1))

    graph, params = trace(Chain().eval(), SHAPE)
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}
    params["norm.running_var"] = params["norm.running_var"].abs() + 0.1
    counts = rounding._chained(graph, params)
    assert counts["conv"] == counts["norm"] == counts["add"] == 19 + 8 + 1
    assert counts["head"] == 73
    image = torch.rand(SHAPE, generator=generator)
    scale = params["norm.weight"] / torch.sqrt(params["norm.running_var"] + graph["norm"]["eps"])
    folded = {
        "conv.weight": params["conv.weight"] * scale[:, None, None, None],
        "conv.bias": (params["conv.bias"] - params["norm.running_mean"]) * scale + params["norm.bias"],
    }
    matrix, bias = affine(graph["conv"], folded, SHAPE)
    terms = matrix.astype(np.float32) * image.numpy().flatten()[None]
    for name, total in ORDERS.items():
        values = evaluate(graph, params, image, total)
        parts = [terms, bias.astype(np.float32)[:, None], image.numpy().reshape(-1, 1)]
        values["add"] = total(np.concatenate(parts, 1))
        values["relu"] = np.maximum(values["add"], 0)
        values["flatten"] = values["relu"]
        assert outside(graph, params, image, values, 0.0) == [], name


# --- range -----------------------------------------------------------------------------------------------------------


def test_overflow_and_nan_prove_nothing() -> None:
    for value in (1e38, math.inf, math.nan):
        graph, params = layers(([[value, value, -value]] * 2, [1.0, 0.0]), inputs=3)
        wide, image = doubled(params), torch.ones(1, 1, 1, 3)
        charged = Rounding.of(graph, wide, "float32")
        box, label = interval.ball(image.double(), 0.0, DOMAIN), torch.tensor([0])
        for margins in (interval.margins, linear.crown_margins):
            assert not bool(margins(graph, wide, box, label, rounding=charged)[0, 1] > -math.inf)


def test_underflow_is_charged() -> None:
    """Products that float32 flushes to 0, scaled up again by the next layer."""
    graph, params = layers(([[2.0**-80]], [0.0]), ([[2.0**100], [0.0]], [0.0, 0.0]), inputs=1)
    image = torch.full((1, 1, 1), 2.0**-80)
    values = evaluate(graph, params, image, forward_order)
    assert values[graph.output.name].tolist() == [0.0, 0.0]
    assert outside(graph, params, image, values, 0.0) == []


def test_an_unknown_arithmetic_is_refused() -> None:
    graph, params = single("mlp", 0)
    with pytest.raises(KeyError):
        Rounding.of(graph, params, "float16")
