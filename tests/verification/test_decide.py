"""Answers to specifications: right on problems whose answer is known, red on planted faults."""

import math
from collections.abc import Callable

import pytest
import torch
from specified import Network, runtime, specification
from torch import Tensor, nn

from cactus_ray.bounds import linear
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.trace import trace
from cactus_ray.errors import UserError
from cactus_ray.verification import decide as module
from cactus_ray.verification.decide import Answer, Result, decide
from cactus_ray.verification.vnnlib import parse_vnnlib
from cactus_ray.verification.witness import ContradictionError


def random_network(seed: int, inputs: int = 2, outputs: int = 3, hidden: int = 8) -> Network:
    layers = nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, outputs)
    )
    graph, params = trace(layers, (inputs,))
    generator = torch.Generator().manual_seed(seed)
    return graph, {k: torch.randn(v.shape, generator=generator).double() for k, v in params.items()}


def absolute() -> Network:
    """Y_0 = |X_0|, Y_1 = X_0."""
    graph, params = trace(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)), (1,))
    values = ([[1.0], [-1.0]], [0.0, 0.0], [[1.0, 1.0], [1.0, -1.0]], [0.0, 0.0])
    return graph, {k: torch.tensor(v, dtype=torch.float64) for k, v in zip(params, values, strict=True)}


def answer(network: Network, text: str, timeout: float = math.inf, **options: str) -> Answer:
    graph, params = network
    stated = parse_vnnlib(text)
    order = torch.arange(graph.input_shape[0])
    return decide(graph, params, stated, order, runtime(network), timeout=timeout, **options)


@pytest.mark.parametrize(
    ("box", "unsafe", "expected"),
    [
        ((-0.5, 0.25), "(>= Y_0 0.51)", "unsat"),
        ((-0.5, 0.25), "(>= Y_0 0.5)", "sat"),
        ((-0.5, 0.25), "(<= Y_0 -0.001)", "unsat"),  # only after a split at 0
        ((-0.5, 0.25), "(and (>= Y_0 0.3) (>= Y_1 0.1))", "unsat"),  # each alone is possible
        ((-0.5, 0.25), "(and (>= Y_0 0.2) (>= Y_1 0.1))", "sat"),
        ((-0.5, 0.25), "(or (>= Y_0 0.6) (and (<= Y_0 0.1) (>= Y_1 0.2)))", "unsat"),
        ((-0.5, 0.25), "(or (>= Y_0 0.6) (<= Y_1 -0.4))", "sat"),
        ((-0.5, 0.25), "(<= 1 0)", "unsat"),
        ((-0.5, 0.25), "(<= 0 1)", "sat"),
        ((0.1, 0.1), "(<= Y_0 0.09)", "unsat"),
        ((0.1, 0.1), "(<= Y_0 0.11)", "sat"),
        ((0.3, 0.2), "(>= Y_0 0)", "unsat"),  # an empty box
    ],
)
def test_known_answers(box: tuple[float, float], unsafe: str, expected: str) -> None:
    found = answer(absolute(), specification([box], 2, unsafe))
    assert found.result == expected
    assert (found.witness is not None) == (expected == "sat")


def test_a_union_of_boxes_is_safe_only_if_every_box_is() -> None:
    text = (
        "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
        "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 LOW) (<= X_0 4))))(assert (<= Y_1 -0.5))"
    )
    assert answer(absolute(), text.replace("LOW", "3")).result == "unsat"
    found = answer(absolute(), text.replace("LOW", "-1"))
    assert found.result == "sat"
    assert found.witness is not None
    assert -1 <= found.witness.inputs.item() <= -0.5


def grid(network: Network, row: Tensor, count: int = 301) -> tuple[float, float]:
    """The smallest value of a form on a grid over [0, 1]^2, and how far below it the true minimum may lie."""
    graph, params = network
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    values = forward(graph, params, torch.cartesian_prod(line, line)) @ row
    weights = [p.abs() for p in params.values() if p.dim() == 2]
    steepest = row.abs() @ weights[2] @ weights[1] @ weights[0]
    return float(values.min()), float(steepest.sum()) / (count - 1) / 2


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_have_the_answer_of_a_grid(seed: int) -> None:
    network = random_network(seed)
    least, below = grid(network, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    text = specification([(0.0, 1.0)] * 2, 3, "(<= (- Y_0 Y_1) {})")
    assert answer(network, text.format(least - 1.01 * below)).result == "unsat"
    found = answer(network, text.format(least + 1e-3))
    assert found.result == "sat"
    assert found.witness is not None
    assert found.witness.outputs[0] - found.witness.outputs[1] <= least + 1e-3
    assert bool(((found.witness.inputs >= 0) & (found.witness.inputs <= 1)).all())


def over_after(patch: pytest.MonkeyPatch, parts: int) -> None:
    """The time is over once so many parts were bounded, however long that takes."""
    patch.setattr(module._Work, "late", property(lambda self: self.parts >= parts))


def test_other_outcomes() -> None:
    network = random_network(0, inputs=5, hidden=30)
    least = float(forward(*network, torch.rand(2000, 5, dtype=torch.float64))[:, 0].min())
    hard = specification([(0.0, 1.0)] * 5, 3, f"(<= Y_0 {least - 5})")
    assert answer(network, specification([(0.0, 1.0)] * 5, 3, "(<= Y_0 -1e9)"), timeout=1e-6).result == Result.TIMEOUT
    broken = network[0], {k: v * torch.nan for k, v in network[1].items()}
    found = answer(broken, hard)
    assert (found.result, found.reason) == (Result.UNKNOWN, "non_finite")
    with pytest.raises(UserError, match="1 inputs and 3 outputs; the network has 5 and 3"):
        answer(network, specification([(0.0, 1.0)], 3, "(<= Y_0 0)"))


def test_memory_that_runs_out_is_met_with_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    true, seen = module._Work.floors, []

    def scarce(self: object, unsafe: object, box: Box, effort: object) -> object:
        seen.append(len(box.center))
        if len(box.center) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return true(self, unsafe, box, effort)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Work, "floors", scarce)
    network = random_network(3)
    least, below = grid(network, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    text = specification([(0.0, 1.0)] * 2, 3, f"(<= Y_0 {least - 1.01 * below})")
    assert answer(network, text).result == "unsat"
    assert max(seen) > 1
    monkeypatch.setattr(module._Work, "floors", lambda *a: (_ for _ in ()).throw(MemoryError()))
    found = answer(network, text)
    assert (found.result, found.reason) == (Result.UNKNOWN, "out_of_memory")


# --- planted faults ---------------------------------------------------------------------------------------------------


def blind(patch: pytest.MonkeyPatch) -> None:
    """No counterexample is ever found, so that only wrong proofs decide; the time is over after some parts."""
    over_after(patch, 600)
    patch.setattr(module, "search", lambda *a, **k: None)
    patch.setattr(module, "confirmed", lambda *a, **k: None)


def one_half(patch: pytest.MonkeyPatch) -> None:
    true = module._Part.halves
    patch.setattr(module._Part, "halves", lambda self: true(self)[:1] * 2)


def touching_halves_lose_a_strip(patch: pytest.MonkeyPatch) -> None:
    true = module._Part.halves

    def halves(self: module._Part) -> list[module._Part]:
        shrunk = [(p, 0.2 * (p.upper - p.lower)) for p in true(self)]
        return [module._Part(p.lower + cut, p.upper, p.moved) for p, cut in shrunk]

    patch.setattr(module._Part, "halves", halves)


def any_disjunct(patch: pytest.MonkeyPatch) -> None:
    """Proving one disjunct is taken for proving all of them."""
    true = module.Unsafe.worst

    def worst(self: module.Unsafe, excess: Tensor) -> Tensor:
        return true(self, excess).amax(1, keepdim=True).expand(-1, len(self.members))

    patch.setattr(module.Unsafe, "worst", worst)


def bounds_too_high(patch: pytest.MonkeyPatch) -> None:
    true = linear.Relaxed.lower_bounds
    patch.setattr(linear.Relaxed, "lower_bounds", lambda self, rows: true(self, rows) + 1.0)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    one_half, touching_halves_lose_a_strip, any_disjunct, bounds_too_high,
]  # fmt: skip


def wrong_proofs() -> int:
    """Of problems that have a counterexample: how many are claimed to have none, or contradict themselves."""
    wrong = 0
    for seed in range(4):
        network = random_network(seed)
        values = forward(*network, torch.rand(500, 2, generator=torch.Generator().manual_seed(seed)).double())
        near = float(values[:, 0].quantile(0.05))
        for unsafe in (f"(<= Y_0 {near})", f"(or (<= Y_0 {near}) (>= Y_1 1000))"):
            try:
                found = answer(network, specification([(0.0, 1.0)] * 2, 3, unsafe))
                wrong += found.result == "unsat"
            except ContradictionError:
                wrong += 1
    return wrong


def test_sound_bounds_prove_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch)
    assert wrong_proofs() == 0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch)
    fault(monkeypatch)
    assert wrong_proofs() > 0


def test_a_witness_that_does_not_replay_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    over_after(monkeypatch, 500)
    graph, params = absolute()
    text = specification([(-0.5, 0.25)], 2, "(>= Y_0 0.4)")

    def other(points: Tensor) -> Tensor:
        return torch.zeros(len(points), 2)

    found = decide(graph, params, parse_vnnlib(text), torch.tensor([0]), other, timeout=math.inf)
    assert (found.result, found.witness) == (Result.TIMEOUT, None)
