"""Quantisers in bounds: exact on ends, lines around the staircase, every rounding beside a tie, and planted faults."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from containment import DOMAIN, points_of, steered_points
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_networks import (
    KINDS,
    beside_ties,
    doubled,
    examples,
    integers,
    narrow,
    on_the_grid,
    quantiser,
    stairs,
)
from single_precision import ORDERS, evaluate
from test_rounding import outside
from torch import Tensor

from cactus_ray.bounds import alpha, interval, linear, quantizer
from cactus_ray.bounds.alpha import Search
from cactus_ray.bounds.answers import possible_answers
from cactus_ray.bounds.graph import Graph, Node, forward, quantize
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.quantizer import QuantizeRelaxation, refuse_twice, relax_quantize
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.compression.materialize import Compressed
from cactus_ray.errors import UnsupportedGraphError

QUANTISERS = [
    quantiser(0.25, 0, 0, 7), quantiser(0.25, 3, 0, 7), quantiser(0.125, -2, -4, 3), quantiser(0.1, 2, 0, 6),
    quantiser(0.5, 7, 0, 7), quantiser(1.0, 0, 0, 1),
]  # fmt: skip


def grid_of(node: Node) -> Tensor:
    """Values around and far beyond all codes: ties, their neighbours, and what lies between."""
    halves = torch.arange(-24, 25, dtype=torch.float64) * node["scale"] / 2
    near = 2.0**-7 * node["scale"]  # no arithmetic of the tests rounds, but for a scale of a tenth
    return torch.cat([halves, halves + near, halves - near]).sort().values


# --- the staircase ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", QUANTISERS)
def test_the_staircase_is_its_definition(node: Node) -> None:
    x = grid_of(node) if node["scale"] != 0.1 else grid_of(node)[1::3]  # a tenth has no exact ties
    assert quantize(node, x).tolist() == [float(stairs(node, v)) for v in x.tolist()]
    assert quantize(node, x.float()).double().tolist() == pytest.approx([float(stairs(node, v)) for v in x.tolist()])


def test_ties_go_to_even_codes_from_the_zero_point_and_ends_saturate() -> None:
    node = quantiser(1.0, 3, 0, 7)
    x = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0, torch.nan], dtype=torch.float64)
    assert quantize(node, x)[:-1].tolist() == [-3.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0]
    assert bool(quantize(node, x)[-1].isnan())


def test_the_gradient_goes_straight_through_but_not_where_a_code_saturates() -> None:
    x = torch.tensor([-1.0, 0.0, 0.6, 3.0, 3.4], requires_grad=True)
    (gradient,) = torch.autograd.grad(quantize(quantiser(1.0, 0, 0, 3), x).sum(), x)
    assert gradient.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("node", [n for n in QUANTISERS if n["scale"] != 0.1])
def test_an_interval_goes_through_exactly(node: Node) -> None:
    """Against every value of a fine grid between every two ends."""
    x = grid_of(node)
    values = quantize(node, x)
    for i in range(0, len(x), 5):
        for j in range(i, len(x), 7):
            box = interval.step(node, {}, [Box.between(x[i], x[j])])
            inside = values[i : j + 1]
            assert (float(box.lower), float(box.upper)) == (float(inside.min()), float(inside.max()))


# --- lines -----------------------------------------------------------------------------------------------------------


def misses(node: Node, low: float, high: float, widening: float, relax: Callable[..., QuantizeRelaxation]) -> int:
    """At how many points of [low, high] a value that may be computed there is outside of the lines."""
    ends = [torch.tensor([[end]], dtype=torch.float64) for end in (low, high)]
    lines = relax(node, Box.between(*ends), widening)
    x = grid_of(node)
    x = torch.cat([x[(x >= low) & (x <= high)], torch.linspace(low, high, 57, dtype=torch.float64)])
    lowest, highest = quantize(node, x - 0.999 * widening), quantize(node, x + 0.999 * widening)
    below = lines.lower_slope * x + lines.lower_intercept > lowest
    above = lines.upper_slope * x + lines.upper_intercept < highest
    assert bool(((lines.lower_slope >= 0) & (lines.lower_slope <= 1)).all())
    assert bool(((lines.upper_slope >= 0) & (lines.upper_slope <= 1)).all())
    return int((below | above).sum())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    number=st.integers(0, len(QUANTISERS) - 1), middle=st.floats(-4, 4), width=st.floats(0, 5),
    widening=st.sampled_from([0.0, 1e-4, 0.01]), independent=st.booleans(),
)  # fmt: skip
def test_lines_hold_all_that_can_be_computed(
    number: int, middle: float, width: float, widening: float, independent: bool
) -> None:
    def relax(*arguments: Any) -> QuantizeRelaxation:
        return relax_quantize(*arguments, independent=independent)

    node = QUANTISERS[number]
    wide = widening * node["scale"]
    assert misses(node, middle - width / 2, middle + width / 2, wide, relax) == 0
    snapped = [round(v / node["scale"] * 2) * node["scale"] / 2 for v in (middle - width / 2, middle + width / 2)]
    assert misses(node, *snapped, wide, relax) == 0


def test_lines_by_hand() -> None:
    """Steps of 1, codes 0 to 3."""

    def lines(low: float, high: float) -> list[float]:
        found = relax_quantize(
            quantiser(1.0, 0, 0, 3), Box.between(*(torch.tensor([[v]], dtype=torch.float64) for v in (low, high)))
        )
        return [float(t) for t in (found.lower_slope, found.lower_intercept, found.upper_slope, found.upper_intercept)]

    near = {"abs": 1e-12}
    assert lines(0.6, 1.4) == pytest.approx([0, 1, 0, 1], **near)  # one code
    assert lines(4.0, 9.0) == pytest.approx([0, 3, 0, 3], **near)  # saturated
    assert lines(0.0, 3.0) == pytest.approx([1, -0.5, 1, 0.5], **near)  # identity plus and minus half a step
    assert lines(0.4, 0.7) == pytest.approx([1, -0.5, 0, 1], **near) or lines(0.4, 0.7) == pytest.approx(
        [1, -0.5, 1, 0.5], **near
    )
    # from far below: the chord from (-3, 0) to the last corner (2.5, 3); below nothing is better than 0
    assert lines(-3.0, 3.0) == pytest.approx([0, 0, 3 / 5.5, 3 - 2.5 * 3 / 5.5], **near)


def test_nan_and_infinite_boxes_give_nan_lines() -> None:
    for end in (torch.nan, torch.inf):
        lines = relax_quantize(QUANTISERS[0], Box(torch.tensor([[0.0]]), torch.tensor([[end]])), torch.tensor([[0.0]]))
        assert bool(lines.lower_slope.isnan().all() & lines.upper_slope.isnan().all())


def test_a_part_of_the_box_has_lines_of_its_own() -> None:
    node = quantiser(1.0, 0, 0, 9)
    whole = relax_quantize(node, Box(torch.tensor([[4.0]]), torch.tensor([[4.0]])), 0.01)
    part = whole.over(Box(torch.tensor([[0.0]]), torch.tensor([[0.0]])))
    assert float(part.upper_slope) == 0
    assert float(part.upper_intercept) == pytest.approx(0.0, abs=1e-5)


# --- networks --------------------------------------------------------------------------------------------------------


def violations(made: Compressed, images: Tensor, epsilon: float, *, count: int = 6, seed: int = 0) -> list[str]:
    """What intervals, linear and optimised bounds get wrong at sampled and steered points of float64 inference."""
    structure, params = doubled(made)
    charged = Rounding.of(structure, params, "float32")
    classes = forward(structure, params, images[:1]).shape[1]
    labels, box = torch.arange(len(images)) % classes, interval.ball(images, epsilon, DOMAIN)
    boxes: dict[str, dict[str, Box]] = {"ibp": {}}
    interval.propagate(structure, params, box, visit=lambda n, b: boxes["ibp"].__setitem__(n.name, b), rounding=charged)
    boxes["crown"] = linear.intermediate_boxes(structure, params, box, rounding=charged)
    nothing = torch.full((len(images), classes), -torch.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    keep: dict[str, Any] = {"known": nothing, "rounding": charged}
    margins = {
        "ibp": interval.margins(structure, params, box, labels, rounding=charged),
        "crown": linear.crown_margins(structure, params, box, labels, **keep),
        "crown over ibp": linear.crown_margins(structure, params, box, labels, effort=Effort("ibp"), **keep),
        "alpha": alpha.alpha_margins(structure, params, box, labels, how=Search(6, target=torch.inf), **keep).lower,
    }
    found = []
    points = points_of(images, epsilon, count, seed)
    for point in points + steered_points(structure, params, images, epsilon, 1 + count // 5, seed):
        values: dict[str, Tensor] = {}
        logits = forward(structure, params, point, visit=lambda n, y, values=values: values.__setitem__(n.name, y))
        for engine, named in boxes.items():
            for name, claimed in named.items():
                if not bool(((values[name] >= claimed.lower) & (values[name] <= claimed.upper)).all()):
                    found.append(f"{engine}: node {name}")
        true = logits.gather(1, labels[:, None]) - logits
        found += [f"{engine}: margin" for engine, lower in margins.items() if not bool((lower <= true).all())]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_contain_sampled_points(kind: str) -> None:
    for seed, epsilon in ((0, 0.02), (1, 0.1), (2, 0.4)):
        assert violations(integers(kind, seed), examples(2, seed).double(), epsilon, seed=seed) == []
    assert violations(narrow(kind), examples(2, 3).double(), 0.1) == []
    assert violations(beside_ties(kind), on_the_grid(beside_ties(kind), 2).double(), 0.05) == []


@pytest.mark.parametrize("kind", KINDS)
def test_float32_in_any_order_stays_inside_beside_ties(kind: str) -> None:
    """Balls of radius 0: only the widening before each quantiser makes room for another code."""
    made = beside_ties(kind, 1)
    for image in on_the_grid(made, 2, 1):
        for name, total in ORDERS.items():
            values = evaluate(made.graph, made.params, image, total)
            assert outside(made.graph, made.params, image, values, 0.0) == [], name


def test_rounding_decides_between_codes_there() -> None:
    """The networks of the test above really lie beside ties: float32 and float64 give codes a step apart."""
    for kind in KINDS:
        made, apart = beside_ties(kind, 1), 0.0
        for image in on_the_grid(made, 3, 1):
            exact: dict[str, Tensor] = {}
            forward(
                *doubled(made), image[None].double(), visit=lambda n, y, e=exact: e.__setitem__(n.name, y.flatten())
            )
            single = evaluate(made.graph, made.params, image, ORDERS["forward"])
            for node in (n for n in made.graph.nodes if n.op == "quantize"):
                apart = max(apart, float(abs(single[node.name] - exact[node.name].numpy()).max() / node["scale"]))
        assert apart > 0.9, kind


def test_one_neuron_by_hand() -> None:
    """Image in steps of 1, one neuron 2 x - 1 behind a ReLU in steps of 4 up to 8, logits (h, 3)."""
    nodes = (
        Node("input", "input"),
        Node("a", "quantize", ("input",), {"scale": 1.0, "zero_point": 0, "low": 0, "high": 255}),
        Node("flat", "flatten", ("a",)), Node("one", "linear", ("flat",)), Node("relu", "relu", ("one",)),
        Node("b", "quantize", ("relu",), {"scale": 4.0, "zero_point": 0, "low": 0, "high": 2}),
        Node("two", "linear", ("b",)),
    )  # fmt: skip
    structure = Graph(nodes, (1, 1, 1))
    params = {
        "one.weight": torch.tensor([[2.0]]), "one.bias": torch.tensor([-1.0]),
        "two.weight": torch.tensor([[1.0], [0.0]]), "two.bias": torch.tensor([0.0, 3.0]),
    }  # fmt: skip
    wide = {k: v.double() for k, v in params.items()}
    # x in [1.7, 3.4] is 2 or 3, the neuron 3 or 5, its code 1 (3/4 and 5/4): h = 4, margin 1
    # x in [1.2, 3.4] is 1, 2 or 3, the neuron 1, 3 or 5, its code 0 or 1: h = 0 or 4, margin -3
    # x in [4.6, 9] is 5 to 9, the neuron 9 to 17, its code saturates at 2: h = 8, margin 5
    for low, high, margin in ((1.7, 3.4, 1.0), (1.2, 3.4, -3.0), (4.6, 9.0, 5.0)):
        box = Box.between(*(torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (low, high)))
        label = torch.tensor([0])
        charged = Rounding.of(structure, wide, "float32")
        found = float(interval.margins(structure, wide, box, label, rounding=charged)[0, 1])
        assert found == pytest.approx(margin, abs=1e-4)
        nothing = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
        crown = float(linear.crown_margins(structure, wide, box, label, known=nothing, rounding=charged)[0, 1])
        assert crown <= margin
        assert crown == pytest.approx(margin, abs=1e-4) or margin < 0


def test_beside_a_tie_both_codes_are_possible() -> None:
    """0.1 + 0.2 + 0.3 is 0.6 in real numbers, just below the tie of a step of 1.2 (1 + 1e-8); float32 may reach it."""
    structure = Graph(
        (Node("input", "input"), Node("flat", "flatten", ("input",)), Node("sum", "linear", ("flat",)),
         Node("q", "quantize", ("sum",), {"scale": 1.0, "zero_point": 0, "low": 0, "high": 3})), (1, 1, 3),
    )  # fmt: skip
    image = torch.tensor([[[[0.1, 0.2, 0.2]]]])
    params = {"sum.weight": torch.ones(2, 3)}
    answers = possible_answers(structure, params, image)
    assert (answers.lower.round().tolist(), answers.upper.round().tolist()) == ([[0.0, 0.0]], [[1.0, 1.0]])
    exact = possible_answers(structure, params, image - 0.001)
    assert exact.upper.round().tolist() == [[0.0, 0.0]]


# --- planted faults: each must be found ------------------------------------------------------------------------------

true_relax, true_stairs, true_step = quantizer.relax_quantize, Rounding.stairs, Rounding.step


def without_half_a_step(patch: pytest.MonkeyPatch) -> None:
    def relax(node: Node, box: Box, widening: Any = 0.0, **options: Any) -> QuantizeRelaxation:
        right = true_relax(node, box, widening, **options)
        half = node["scale"] / 2
        return replace(
            right,
            lower_intercept=right.lower_intercept + half * right.lower_slope,
            upper_intercept=right.upper_intercept - half * right.upper_slope,
        )

    patch.setattr(linear, "relax_quantize", relax)


def saturation_ignored(patch: pytest.MonkeyPatch) -> None:
    def relax(node: Node, box: Box, widening: Any = 0.0, **options: Any) -> QuantizeRelaxation:
        right = true_relax(node, box, widening, **options)
        one, half = torch.ones_like(right.lower_slope), torch.full_like(right.lower_slope, node["scale"] / 2)
        return QuantizeRelaxation(node, right.widening, one, -half - right.widening, one, half + right.widening)

    patch.setattr(linear, "relax_quantize", relax)


def wrong_zero_point(patch: pytest.MonkeyPatch) -> None:
    def shifted(self: Rounding, node: Node, box: Box) -> Box:
        return true_stairs(self, replace(node, attributes={**node.attributes, "zero_point": node["low"]}), box)

    patch.setattr(Rounding, "stairs", shifted)


def widened_after(patch: pytest.MonkeyPatch) -> None:
    def after(self: Rounding, node: Node, box: Box) -> Box:
        out = interval.step(node, {}, [box])
        return Box(out.center, out.radius + self.widening(node, box))

    patch.setattr(Rounding, "stairs", after)
    patch.setattr(Rounding, "step", uncharged_before_quantisers)


def uncharged_before_quantisers(self: Rounding, node: Node, params: Any, inputs: list[Box]) -> Box:
    """Layers give their boxes in real arithmetic, and these are widened by the charge where nothing rounds any more."""
    if node.op in ("linear", "conv2d"):
        return interval.step(node, params, inputs)
    return true_step(self, node, params, inputs)


def found_by(kind: str) -> bool:
    """Whether the checks above find anything: sampled points, and float32 in any order beside ties."""
    images = examples(2, 3).double()
    if any(violations(made, images, e, count=3) for made in (integers(kind, 3), narrow(kind, 3)) for e in (0.1, 0.01)):
        return True
    made = beside_ties(kind, 1)
    return any(
        outside(made.graph, made.params, image, evaluate(made.graph, made.params, image, total), 0.0)
        for image in on_the_grid(made, 2, 1)
        for total in ORDERS.values()
    )


sound = cache(found_by)
"""As ``found_by``, of bounds as they are: once for each kind."""


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (without_half_a_step, "conv"), (saturation_ignored, "mlp"), (wrong_zero_point, "residual"),
        (widened_after, "mlp"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_planted_faults_are_found(fault: Callable[[Any], None], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sound(kind)
    fault(monkeypatch)
    assert found_by(kind)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_two_quantisers_in_a_row_are_refused() -> None:
    first = Node("a", "quantize", ("input",), {"scale": 0.5, "zero_point": 0, "low": 0, "high": 255})
    for between in ("relu", "flatten", "max_pool2d"):
        middle, last = Node("m", between, ("a",)), replace(first, name="b", inputs=("m",))
        refuse_twice(Graph((Node("input", "input"), first, middle, last), (1, 2, 2)))  # the same numbers: no change
        other = replace(last, attributes={**first.attributes, "scale": 0.25})
        with pytest.raises(UnsupportedGraphError, match="'b' rounds what 'a' has rounded"):
            refuse_twice(Graph((Node("input", "input"), first, middle, other), (1, 2, 2)))


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}, {"scale": "1"}, {"zero_point": 300}, {"high": None}],
)
def test_a_network_file_with_impossible_numbers_is_refused(wrong: dict[str, Any]) -> None:
    plain = Graph((Node("input", "input"), quantiser()), (1, 1, 1)).to_json()
    assert Graph.from_json(plain)["q"]["scale"] == 0.25
    plain["nodes"][1][3] |= wrong
    with pytest.raises(UnsupportedGraphError, match="quantiser 'q'"):
        Graph.from_json(plain)
