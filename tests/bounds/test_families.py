"""Bounds of all networks whose weights lie within radii: hand-worked values, sampled members, planted faults."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from containment import DOMAIN, points_of
from single_precision import ORDERS, evaluate, layers
from small_networks import KINDS, SHAPE, network
from torch import Tensor, nn

from cactus_ray.bounds import alpha, interval, linear, rounding
from cactus_ray.bounds.graph import Graph, Node, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.spread import Spread, chord
from cactus_ray.bounds.trace import trace

EPSILON = 0.05
SLACK = 1e-9


def radii_of(graph: Graph, params: Params, share: float = 0.04) -> Params:
    """A share of the largest weight of every output channel, as a quantiser's step is; some weights are exact."""
    found = {}
    for node in graph.weighted():
        weight = params[f"{node.name}.weight"]
        largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
        found[f"{node.name}.weight"] = (share * largest).expand_as(weight).clone().masked_fill(weight.abs() < 0.01, 0.0)
    return found


def random_members(params: Params, radii: Params, count: int, seed: int) -> list[Params]:
    """The centre, the two opposite ends, and random corners and inner points of the weights' intervals."""
    generator = torch.Generator().manual_seed(seed)
    found = [params, *({**params, **{k: params[k] + s * r for k, r in radii.items()}} for s in (-1, 1))]
    for _ in range(count):
        share = {k: 2 * torch.rand(r.shape, generator=generator, dtype=r.dtype) - 1 for k, r in radii.items()}
        found.append({**params, **{k: params[k] + share[k] * r for k, r in radii.items()}})
        found.append({**params, **{k: params[k] + share[k].sign() * r for k, r in radii.items()}})
    return found


def steered(graph: Graph, params: Params, radii: Params, images: Tensor, seed: int) -> list[tuple[Params, Tensor]]:
    """Corners of weights and input together, at which a neuron or a margin is near its extreme."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = images.sub(EPSILON).clamp(*DOMAIN), images.add(EPSILON).clamp(*DOMAIN)
    found = []
    for node in graph.nodes[1:]:
        pick: Tensor | None = None
        for sign in (1, -1):
            x, weights = images, params
            for _ in range(3):
                x = x.detach().requires_grad_()
                weights = {k: v.detach().requires_grad_(k in radii) for k, v in weights.items()}
                values: dict[str, Tensor] = {}
                forward(graph, weights, x, visit=lambda n, y, values=values: values.__setitem__(n.name, y.flatten(1)))
                y = values[node.name]
                if pick is None:
                    pick = torch.zeros_like(y)
                    pick[0, int(torch.randint(y.shape[1], (1,), generator=generator))] = 1.0
                    pick = pick - pick.roll(1, 1) if node is graph.output else pick
                names = list(radii)
                slopes = torch.autograd.grad((y * pick).sum(), [x, *(weights[k] for k in names)], allow_unused=True)
                if slopes[0] is not None:
                    x = torch.where(sign * slopes[0] > 0, upper, lower)
                moved = {
                    k: params[k] + (0 if s is None else sign * s.sign()) * radii[k]
                    for k, s in zip(names, slopes[1:], strict=True)
                }
                weights = {**params, **moved}
            found.append((weights, x.detach()))
    return found


def violations(graph: Graph, params: Params, radii: Params, images: Tensor, seed: int = 0) -> list[str]:
    """Where members leave what is claimed of the family, at sampled and steered points."""
    charged = Rounding.of(graph, params, "real", radii)
    labels = torch.arange(len(images)) % 3
    box = interval.ball(images, EPSILON, DOMAIN)
    boxes: dict[str, dict[str, Box]] = {
        "ibp": {},
        "crown": linear.intermediate_boxes(graph, params, box, rounding=charged),
    }
    interval.propagate(graph, params, box, visit=lambda n, b: boxes["ibp"].__setitem__(n.name, b), rounding=charged)
    ibp = interval.margins(graph, params, box, labels, rounding=charged)
    nothing = torch.full_like(ibp, -torch.inf).scatter(1, labels[:, None], 0.0)
    margins = {
        "ibp": ibp,
        "crown": linear.crown_margins(graph, params, box, labels, known=nothing, rounding=charged),
        "alpha": alpha.alpha_margins(
            graph, params, box, labels, known=nothing, how=alpha.Search(iterations=3), rounding=charged
        ).lower,
    }
    points = points_of(images, EPSILON, 2, seed)
    pairs = [(m, x) for m in random_members(params, radii, 6, seed) for x in points]
    found = set()
    for weights, x in pairs + steered(graph, params, radii, images, seed):
        values: dict[str, Tensor] = {}

        def keep(node: Node, value: Tensor, values: dict[str, Tensor] = values) -> None:
            values[node.name] = value.detach()

        logits = forward(graph, weights, x, visit=keep).detach()
        for engine, named in boxes.items():
            for name, claimed in named.items():
                value = values[name]
                if not bool(((value >= claimed.lower - SLACK) & (value <= claimed.upper + SLACK)).all()):
                    found.add(f"{engine}: {name}")
        true = logits.gather(1, labels[:, None]) - logits
        found |= {f"{engine}: margin" for engine, lower in margins.items() if not bool((lower <= true + SLACK).all())}
    return sorted(found)


def images_of(seed: int) -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- values worked by hand -------------------------------------------------------------------------------------------


def two_by_two() -> tuple[Graph, Params, Params, Box]:
    """A 2-2-2 network with a ReLU, radii of 0.1 and 0.2, and the box [0.5, 1.5] x [0, 1]."""
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), (1, 1, 2))
    first, second = (n.name for n in graph.weighted())
    numbers = {
        f"{first}.weight": [[1.0, -1.0], [2.0, 0.0]], f"{first}.bias": [0.0, -1.0],
        f"{second}.weight": [[1.0, 1.0], [-1.0, 0.5]], f"{second}.bias": [0.0, 0.1],
    }  # fmt: skip
    wide = {k: torch.tensor(numbers[k], dtype=torch.float64) for k in params}
    radii = {f"{name}.weight": torch.full((2, 2), r, dtype=torch.float64) for name, r in ((first, 0.1), (second, 0.2))}
    box = Box(torch.tensor([[[[1.0, 0.5]]]], dtype=torch.float64), torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64))
    return graph, wide, radii, box


def test_boxes_of_a_small_family_by_hand() -> None:
    """|x| <= (1.5, 1): the first layer's weights cost 0.1 * 2.5. Then x <= (1.75, 2.25): the second's 0.2 * 4."""
    graph, params, radii, box = two_by_two()
    charged = Rounding.of(graph, params, "real", radii)
    boxes: dict[str, Box] = {}
    interval.propagate(graph, params, box, visit=lambda n, b: boxes.__setitem__(n.name, b), rounding=charged)
    first, second = (boxes[n.name] for n in graph.weighted())
    assert first.lower[0].tolist() == pytest.approx([-0.75, -0.25], abs=1e-12)
    assert first.upper[0].tolist() == pytest.approx([1.75, 2.25], abs=1e-12)
    assert second.lower[0].tolist() == pytest.approx([-0.8, -2.45], abs=1e-12)
    assert second.upper[0].tolist() == pytest.approx([4.8, 2.025], abs=1e-12)


def test_margins_of_a_small_family_by_hand() -> None:
    """IBP: 2.3125 - 0.1 - 2.3125 - 2 * 0.8. CROWN takes both lower slopes 1, and |relu(z)| = relu(z) >= 0:

    ``(2 - 0.4) relu(z1) + (0.5 - 0.4) relu(z2) - 0.1 >= 1.6 z1 + 0.1 z2 - 0.1``, and with |x| = x >= 0 at its worst
    ``1.6 (0.9 x1 - 1.1 x2) + 0.1 (1.9 x1 - 0.1 x2 - 1) - 0.1`` at x = (0.5, 1).
    """
    graph, params, radii, box = two_by_two()
    charged, label = Rounding.of(graph, params, "real", radii), torch.tensor([0])
    assert float(interval.margins(graph, params, box, label, rounding=charged)[0, 1]) == pytest.approx(-1.7, abs=1e-12)
    nothing = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    crown = linear.crown_margins(graph, params, box, label, known=nothing, rounding=charged)
    assert float(crown[0, 1]) == pytest.approx(0.72 - 1.76 + 0.095 - 0.01 - 0.1 - 0.1, abs=1e-12)


def test_one_layer_is_exact_backward() -> None:
    """Without a ReLU the worst member over inputs >= 0 is attained: the charge varies with the input."""
    graph, params = layers(([[0.5, -0.25, 1.0], [0.0, 2.0, -1.0]], [0.0, 0.25]), inputs=3)
    wide = {k: v.double() for k, v in params.items()}
    (name,) = (f"{n.name}.weight" for n in graph.weighted())
    radii = {name: torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, 0.1]], dtype=torch.float64)}
    center = torch.tensor([[[[0.5, 0.3, 0.9]]]], dtype=torch.float64)
    box, label = Box(center, torch.full_like(center, 0.1)), torch.tensor([0])
    nothing = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    charged = Rounding.of(graph, wide, "real", radii)
    lower = linear.crown_margins(graph, wide, box, label, known=nothing, rounding=charged)
    # (w0 - w1) x, every weight at its worst: 0.5 - 0.1 - 0.3, -2.25 - 0.2, 2 - 0.1; x at 0.4, 0.4, 0.8
    assert float(lower[0, 1]) == pytest.approx(0.1 * 0.4 - 2.45 * 0.4 + 1.9 * 0.8 - 0.25, abs=1e-12)


# --- members stay inside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_members_stay_inside(kind: str) -> None:
    graph, params = network(kind, 5)
    assert violations(graph, params, radii_of(graph, params), images_of(2)) == []


@pytest.mark.parametrize("kind", ["mlp", "deep conv", "residual", "max pool"])
def test_radius_0_is_no_family(kind: str) -> None:
    graph, params = network(kind, 5)
    box, labels = interval.ball(images_of(2), EPSILON, DOMAIN), torch.arange(3)
    nothing = {name: torch.zeros_like(params[name]) for name in radii_of(graph, params)}
    for arithmetic in ("real", "float32"):
        alone, family = (Rounding.of(graph, params, arithmetic, radii) for radii in (None, nothing))
        for margins in (interval.margins, linear.crown_margins):
            expected = margins(graph, params, box, labels, rounding=alone)
            assert torch.equal(margins(graph, params, box, labels, rounding=family), expected)


def test_the_chord_is_above_the_absolute_value() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
    ends[:, :50] *= 1e-300
    ends[:, 50:100] *= 1e300
    ends[0, 100:200] = ends[1, 100:200]
    ends[0, 200:300] = 0.0
    box = Box.between(ends.amin(0), ends.amax(0))
    slope, offset, largest = chord(box)
    for share in torch.linspace(0, 1, 11, dtype=torch.float64):
        x = box.lower + share * (box.upper - box.lower)
        room = 1e-15 * largest
        assert bool((x.abs() <= slope * x + offset + room).all())
        assert bool((slope * x + offset <= largest + room).all())


@pytest.mark.parametrize("kind", ["mlp", "deep conv", "residual"])
def test_a_wider_family_has_lower_bounds_and_its_own_rounding(kind: str) -> None:
    graph, params = network(kind, 5)
    box, labels = interval.ball(images_of(2), EPSILON, DOMAIN), torch.arange(3)
    others = torch.eye(3, dtype=torch.bool).logical_not()
    lower = [
        interval.margins(graph, params, box, labels, rounding=Rounding.of(graph, params, arithmetic, radii))[others]
        for arithmetic, radii in (
            ("real", None), ("real", radii_of(graph, params, 0.01)), ("real", radii_of(graph, params, 0.02)),
            ("float32", radii_of(graph, params, 0.02)),
        )
    ]  # fmt: skip
    assert all(bool((a > b).all()) for a, b in itertools.pairwise(lower))


# --- float32 members -------------------------------------------------------------------------------------------------


def beyond_the_box() -> float:
    """How far float32 sums of a member at the end of its weights' intervals leave the box of a family around 0.

    The weights are such that one order of summation rounds up nearly every time; the ball has radius 0.
    """
    above_half_a_digit = float(np.float32(2.0**-24 * 1.0001))
    graph, member = layers(([[1.0] + [above_half_a_digit] * 199] * 2, [0.0, 0.0]), inputs=200)
    (name,) = (f"{n.name}.weight" for n in graph.weighted())
    centre = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in member.items()}
    image = torch.ones(1, 1, 200)
    charged = Rounding.of(graph, centre, "float32", {name: member[name].double()})
    out = interval.propagate(graph, centre, interval.ball(image[None].double(), 0.0, DOMAIN), rounding=charged)
    highest = max(float(evaluate(graph, member, image, total)[graph.output.name].max()) for total in ORDERS.values())
    return highest - float(out.upper.min())


def test_the_rounding_of_members_is_charged() -> None:
    assert beyond_the_box() <= 0


def test_the_rounding_of_members_must_be_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test above: the charge of exact members."""
    exact = Rounding.of
    monkeypatch.setattr(Rounding, "of", lambda g, p, a, radii=None: exact(g, p, "real", radii))
    assert beyond_the_box() > 0


# --- planted faults --------------------------------------------------------------------------------------------------


def wrong_sizes(function: Callable[[Box], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """The charge of weights over other sizes of the inputs."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        true = Rounding._spread
        boxes: dict[int, Tensor] = {}
        magnitude = rounding.magnitude

        def remember(box: Box) -> Tensor:
            size = magnitude(box)
            boxes[id(size)] = function(box)
            kept.append(size)  # so that no id is used twice
            return size

        kept: list[Tensor] = []
        patch.setattr(rounding, "magnitude", remember)
        patch.setattr(Rounding, "_spread", lambda self, node, sizes: true(self, node, [boxes[id(s)] for s in sizes]))

    return plant


def other_radii(function: Callable[[Params], Params]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        true = Rounding.of
        patch.setattr(Rounding, "of", lambda g, p, a, radii=None: true(g, p, a, radii and function(radii)))

    return plant


def boxes_of_the_centre(patch: pytest.MonkeyPatch) -> None:
    """Backward bounds are charged, but over boxes that hold for the centre only."""
    true = Rounding.step

    def step(self: Rounding, node: Node, params: Params, inputs: list[Box]) -> Box:
        radii = self.radii
        object.__setattr__(self, "radii", {})
        try:
            return true(self, node, params, inputs)
        finally:
            object.__setattr__(self, "radii", radii)

    patch.setattr(Rounding, "step", step)


def no_backward_charge(patch: pytest.MonkeyPatch) -> None:
    true = Rounding.charges

    def charges(self: Rounding, graph: Graph, params: Params, boxes: dict[str, Box]) -> dict[str, Tensor]:
        return true(Rounding(self.nodes, self.unit, self.shared), graph, params, boxes)

    patch.setattr(Rounding, "charges", charges)


def of_spreads(function: Callable[[Spread], Spread]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        true = linear.spreads
        patch.setattr(linear, "spreads", lambda *given: {k: function(s) for k, s in true(*given).items()})

    return plant


FAULTS = {
    "nothing of |x|: only the box's radius": (wrong_sizes(lambda b: b.radius), {"ibp", "crown"}),
    "only the center": (wrong_sizes(lambda b: b.center.abs()), {"ibp", "crown"}),
    "the upper end": (wrong_sizes(lambda b: b.upper.clamp(min=0)), {"ibp"}),
    "radii in codes": (other_radii(lambda r: {k: v / 127 for k, v in r.items()}), {"ibp", "crown"}),
    "half of the radii": (other_radii(lambda r: {k: v / 2 for k, v in r.items()}), {"ibp"}),
    "a layer is forgotten": (other_radii(lambda r: dict(list(r.items())[1:])), {"ibp", "crown"}),
    "boxes of the centre": (boxes_of_the_centre, {"ibp", "crown"}),
    "the last layer is forgotten": (other_radii(lambda r: dict(list(r.items())[:-1])), {"crown", "alpha"}),
    "backward bounds are not charged": (no_backward_charge, {"crown"}),
    "more is given back than was charged": (of_spreads(lambda s: replace(s, credit=2 * s.credit)), {"crown", "alpha"}),
    "given back, and nothing for it": (of_spreads(lambda s: replace(s, slope=0 * s.slope)), {"crown", "alpha"}),
    "the other sign of |x|": (of_spreads(lambda s: replace(s, slope=-s.slope)), {"crown", "alpha"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, engines = FAULTS[fault]
    plant(monkeypatch)
    missing = set(engines)
    for kind in ("mlp", "deep conv", "residual"):
        graph, params = network(kind, 5)
        radii = radii_of(graph, params)
        last = {k: r if k == list(radii)[-1] else 0.01 * r for k, r in radii.items()}
        for chosen in (radii, last):
            if missing:
                missing -= {text.split(":")[0] for text in violations(graph, params, chosen, images_of(2))}
    assert not missing


# --- input -----------------------------------------------------------------------------------------------------------


def test_radii_that_mean_nothing_are_refused() -> None:
    graph, params = network("batch norm", 0)
    name = next(iter(radii_of(graph, params)))
    shape, other = params[name].shape, next(k for k in params if k.endswith("running_mean"))
    for radii in (
        {other: torch.zeros_like(params[other])},
        {"nobody.weight": torch.zeros(1)},
        {name: torch.zeros(1, dtype=torch.float64)},
        {name: torch.zeros(shape)},
        {name: torch.full(shape, -1e-9, dtype=torch.float64)},
    ):
        with pytest.raises(ValueError, match="radius of"):
            Rounding.of(graph, params, "real", radii)


def test_nan_and_huge_radii_prove_nothing() -> None:
    graph, params = network("mlp", 0)
    box, labels = interval.ball(images_of(0), EPSILON, DOMAIN), torch.arange(3)
    for value in (torch.nan, torch.inf, 1e40):
        radii = {k: torch.full_like(r, value) for k, r in radii_of(graph, params).items()}
        charged = Rounding.of(graph, params, "float32", radii)
        for margins in (interval.margins, linear.crown_margins):
            found = margins(graph, params, box, labels, rounding=charged)
            assert not bool((found > 0).any()), value
