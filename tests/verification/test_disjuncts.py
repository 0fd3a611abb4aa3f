"""Specifications over many inputs: exact answers, every kind of network, budgets, and planted faults."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import unroll
from oracle_forms import excess
from specified import specification
from specified_cases import OUTPUTS, Stated, answer, stated
from torch import Tensor

from cactus_ray.bounds import ascent, splits
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.splits import Problems, Region, Root
from cactus_ray.verification import branch, decide, disjuncts
from cactus_ray.verification.soundness import Model
from cactus_ray.verification.tree import Budget
from cactus_ray.verification.unsafe import Unsafe
from cactus_ray.verification.vnnlib import parse_vnnlib
from cactus_ray.verification.witness import ContradictionError

sys.path.append(str(Path(__file__).parents[1] / "bounds"))
from small_networks import KINDS, SHAPE, network

CASES = 40
BLOCKS = [range(first, first + 8) for first in range(0, CASES, 8)]
known = cache(stated)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Fewer steps for each bound: more is left to splitting."""
    monkeypatch.setattr(disjuncts, "ALPHA_STEPS", 8)
    return monkeypatch


def judge(number: int) -> tuple[str, str]:
    """The answer to a case, and what is wrong with it (empty: nothing)."""
    case = known(number)
    found = answer(case)
    if found.result == "unsat" and case.high <= 0:
        return found.result, "wrong unsat"
    if found.witness is None:
        return found.result, "" if found.result != "sat" else "no witness"
    values = found.witness.inputs.double().flatten().numpy()
    box = np.array([[float(x) for x in side] for side in box_of(case)])
    inside = bool((values >= box[0] - 1e-6).all() and (values <= box[1] + 1e-6).all())
    reached = distance(case, values) <= 1e-5
    return found.result, "" if inside and reached and case.low <= 0 else "wrong sat"


def box_of(case: Stated) -> tuple[tuple[object, ...], tuple[object, ...]]:
    (only,) = parse_vnnlib(case.text).cases
    return only.lower, only.upper


def distance(case: Stated, values: np.ndarray) -> float:
    """How far an input is from the unsafe set, by the oracle's own arithmetic."""
    program, (only,) = unroll(*case.network), parse_vnnlib(case.text).cases
    found = []
    for constraints in only.unsafe:
        rows = np.zeros((len(constraints), OUTPUTS))
        for row, constraint in zip(rows, constraints, strict=True):
            for index, factor in constraint.coefficients:
                row[index] = float(factor)
        found.append(excess(program, values, rows, np.array([float(c.bound) for c in constraints])))
    return min(found)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_answers_near_the_edge_are_those_of_the_oracle(block: range, quick: pytest.MonkeyPatch) -> None:
    found = {number: judge(number) for number in block}
    assert {n: fault for n, (_, fault) in found.items() if fault} == {}
    answers = {number: result for number, (result, _) in found.items()}
    assert answers == {number: ("unsat", "sat")[number % 2] for number in block}  # none is left open


def test_the_cases_are_near_and_of_every_kind() -> None:
    cases = [known(number) for number in range(CASES)]
    assert all(case.high - case.low < 1e-3 for case in cases)
    assert all((case.low > 0) if number % 2 == 0 else (case.high < 0) for number, case in enumerate(cases))
    assert all(abs(case.low) < 0.11 for case in cases)
    unsafe = [parse_vnnlib(case.text).cases[0].unsafe for case in cases]
    assert {len(u) for u in unsafe} == {1, 2, 3}
    assert {len(d) for u in unsafe for d in u} == {1, 2, 3}


def test_counterexamples_are_found_without_the_attack(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(decide, "search", lambda *a, **k: None)
    assert [judge(number) for number in range(1, 16, 2)] == [("sat", "")] * 8


def test_splitting_decides_what_bounds_leave_open() -> None:
    whole = answer(known(4))
    assert whole.result == "unsat"
    assert whole.parts > 10


def test_the_same_specification_gives_the_same_tree(quick: pytest.MonkeyPatch) -> None:
    first, second = answer(known(24)), answer(known(24))
    assert first.parts > 10
    assert (first.result, first.parts) == (second.result, second.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_handled(kind: str, quick: pytest.MonkeyPatch) -> None:
    graph, params = network(kind, 1)
    params = {k: v.float().double() for k, v in params.items()}
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=3)
    radius, outputs = 0.05, 3
    points = image + radius * (2 * torch.rand(500, *SHAPE, generator=torch.Generator().manual_seed(2)) - 1).double()
    values = forward(graph, params, points)
    margins = values[:, 0] - values[:, 1]
    box = [(v - radius, v + radius) for v in image.flatten().tolist()]
    limited(quick)
    for number, expected in (
        (float(margins.min()) + 1e-3, ("sat", "unknown")),
        (float(margins.min()) - 0.5 * float(margins.max() - margins.min()) - 0.05, ("unsat", "sat", "unknown")),
        (float(margins.min()) - 50 * float(margins.max() - margins.min()) - 5.0, ("unsat",)),
    ):
        text = specification(box, outputs, f"(or (<= (- Y_0 Y_1) {number!r}) (and (<= Y_0 -1e4) (>= Y_2 1e4)))")
        case = Stated((graph, params), text, 0.0, 0.0)
        assert answer(case).result in expected


def test_conjuncts_that_contradict_each_other_are_mixed() -> None:
    """Each alone is possible in nearly every sub-domain, so that no single form proves anything."""
    network = known(0).network
    image = torch.full((1, 1, 9, 9), 0.5, dtype=torch.float64)
    value = float(forward(*network, image)[0, 0])
    text = specification([(0.4, 0.6)] * 81, OUTPUTS, f"(and (<= Y_0 {value}) (>= Y_0 {value + 0.01}))")
    found = answer(Stated(network, text, 0.0, 0.0))
    assert found.result == "unsat"
    assert 1 < found.parts < 10


def limited(patch: pytest.MonkeyPatch, nodes: int = 60) -> None:
    """A small budget of sub-problems."""
    patch.setattr(disjuncts, "Budget", lambda nodes, few=nodes, **rest: Budget(nodes=few, **rest))


def test_limits_and_nan_leave_a_case_open(quick: pytest.MonkeyPatch) -> None:
    blind(quick)
    with quick.context() as patch:
        limited(patch, 3)
        found = answer(known(5))
        assert (found.result, found.reason) == ("unknown", "nodes")
    with quick.context() as patch:
        patch.setattr(disjuncts, "Budget", lambda **rest: Budget(**{**rest, "deadline": 0.0}))
        found = answer(known(5))
        assert (found.result, found.reason) == ("timeout", "time")
    true = ascent.decide
    with quick.context() as patch:
        for module in (ascent, branch):
            patch.setattr(module, "decide", lambda *a: nan(true(*a)))
        found = answer(known(4))
        assert (found.result, found.reason) == ("unknown", "bounds")


def nan(found: ascent.Found) -> ascent.Found:
    return ascent.Found(found.lower * torch.nan, *[getattr(found, n) for n in ascent.Found.__slots__[1:]])


def test_memory_that_runs_out_is_met_with_smaller_batches(quick: pytest.MonkeyPatch) -> None:
    true, seen = branch.optimise, []

    def scarce(root: Root, problems: Problems, *rest: object) -> ascent.Found:
        seen.append(len(problems))
        if len(problems) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return true(root, problems, *rest)  # type: ignore[arg-type]

    whole = answer(known(36))
    quick.setattr(branch, "optimise", scarce)
    found = answer(known(36))
    assert whole.parts > 10
    assert max(seen) > 2
    assert (whole.result, found.result) == ("unsat", "unsat")
    quick.setattr(branch, "optimise", lambda *a: (_ for _ in ()).throw(MemoryError()))
    found = answer(known(36))
    assert (found.result, found.reason) == ("unknown", "out_of_memory")


# --- planted faults ---------------------------------------------------------------------------------------------------


def blind(patch: pytest.MonkeyPatch) -> None:
    """No counterexample is ever found and no bound checked at points, so that only wrong proofs decide."""
    for module in (decide, disjuncts):
        patch.setattr(module, "confirmed", lambda *a: None)
    patch.setattr(decide, "search", lambda *a, **k: None)
    patch.setattr(decide._Work, "check", lambda *a: None)
    patch.setattr(disjuncts._Disjuncts, "check", lambda *a: None)


true_forms, true_split, true_halves, true_decide = disjuncts.with_forms, branch.split, splits.halves, ascent.decide
true_worst = Unsafe.worst


def forms_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    def negated(model: Model, unsafe: Unsafe) -> Model:
        found = true_forms(model, unsafe)
        return Model.of(found.graph, {k: -v if k.startswith(disjuncts.FORMS) else v for k, v in found.double.items()})

    patch.setattr(disjuncts, "with_forms", negated)


def weights_below_zero(patch: pytest.MonkeyPatch) -> None:
    def mixed(weights: Tensor, gradient: Tensor, mixable: Tensor, missing: Tensor) -> Tensor:
        moved = torch.where(mixable, weights.detach() + gradient / gradient.abs().amax(), 0.0)
        return moved - torch.where(mixable, (moved.sum(1, keepdim=True) - 1) / mixable.sum(1, keepdim=True), 0.0)

    patch.setattr(ascent, "mixed", mixed)


def forms_of_other_disjuncts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        disjuncts._Disjuncts,
        "incidence",
        property(lambda self: torch.ones(len(self.unsafe.members), len(self.unsafe.rows), dtype=torch.bool)),
    )


def multiplier_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "multiplier", staticmethod(lambda sign, beta: sign * beta))


def forgotten_half(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(branch, "split", lambda signs, picked: true_split(signs, picked)[: len(signs)].repeat(2, 1))


def split_constraint_of_the_other_half(patch: pytest.MonkeyPatch) -> None:
    def halves(root: Root, problems: Problems) -> tuple[Tensor, Tensor]:
        return true_halves(root, splits.replace(problems, sign=problems.sign.abs()))

    patch.setattr(splits, "halves", halves)


def nan_is_above_zero(patch: pytest.MonkeyPatch) -> None:
    for module in (ascent, branch):
        patch.setattr(module, "decide", lambda *a: nan(true_decide(*a)))
    patch.setattr(Unsafe, "worst", lambda self, excess: true_worst(self, excess).nan_to_num(nan=1.0))


def bounds_too_high(patch: pytest.MonkeyPatch) -> None:
    def decide_(*arguments: object) -> ascent.Found:
        found = true_decide(*arguments)  # type: ignore[arg-type]
        return ascent.Found(found.lower + 0.2, *[getattr(found, n) for n in ascent.Found.__slots__[1:]])

    for module in (ascent, branch):
        patch.setattr(module, "decide", decide_)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    forms_of_the_wrong_sign, weights_below_zero, forms_of_other_disjuncts, multiplier_of_the_wrong_sign, forgotten_half,
    split_constraint_of_the_other_half, nan_is_above_zero, bounds_too_high,
]  # fmt: skip


def wrong_proofs(block: range) -> list[int]:
    """Cases inside the unsafe set that are claimed to be outside it, up to the first."""
    for number in block[1::2]:
        if judge(number)[1] == "wrong unsat":
            return [number]
    return []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_sound_bounds_prove_nothing_that_is_wrong(block: range, quick: pytest.MonkeyPatch) -> None:
    blind(quick)
    limited(quick)
    assert wrong_proofs(block) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], quick: pytest.MonkeyPatch) -> None:
    blind(quick)
    limited(quick)
    fault(quick)
    assert wrong_proofs(range(CASES)) != []


def test_a_wrong_bound_of_a_sub_problem_is_contradicted(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(disjuncts, "confirmed", lambda *a: None)
    quick.setattr(decide, "search", lambda *a, **k: None)
    limited(quick)
    bounds_too_high(quick)
    with pytest.raises(ContradictionError, match="disjunct"):
        [answer(known(number)) for number in range(1, CASES, 2)]
