"""Verdicts near the exact robust radius against stored exact brackets, and what a planted fault does to them."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from oracle import box, smallest_margin
from oracle_campaign import LEVELS, NETWORKS, PER_SUBJECT, Campaign, Case, strongest, table
from oracle_fixture import FIXTURE, from_json, load, to_json

from cactus_ray.bounds import interval, relaxation, splits
from cactus_ray.bounds.graph import Node, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rows import Rows
from cactus_ray.verification import branch, work
from cactus_ray.verification.verdict import VerificationSettings

FIXED = 100
PATIENCE = 1e9
"""Seconds per sample: nothing is left open because the machine is busy."""


@pytest.fixture(scope="module")
def stored() -> tuple[Campaign, list[Case]]:
    return load()


@pytest.fixture(scope="module")
def campaign(stored: tuple[Campaign, list[Case]]) -> Campaign:
    return stored[0]


@pytest.fixture(scope="module")
def cases(stored: tuple[Campaign, list[Case]]) -> list[Case]:
    return stored[1]


@pytest.fixture(scope="module")
def bench(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("bench_oracle")


def faults(records: list[dict[str, Any]]) -> list[str]:
    return [f"case {r['case']}: {fault}: {r}" for r in records for fault in r["faults"]]


# --- the fixture is what it claims to be -----------------------------------------------------------------------------


def test_the_cases_are_hard_and_of_every_kind(cases: list[Case]) -> None:
    assert FIXTURE.stat().st_size < 300_000
    for some in (cases[:FIXED], cases):
        assert [c.number for c in some] == list(range(len(some)))
        assert len(some) >= FIXED
        assert np.mean([c.near for c in some]) >= 0.5
        assert np.median([c.unstable for c in some]) >= 15
        for side in (1, -1):
            assert np.mean([side * (c.epsilon - np.mean(c.subject.radius)) > 0 for c in some if c.near]) > 0.3
        assert {(c.subject.network, c.subject.level) for c in some} == {(n, v) for n in NETWORKS for v in LEVELS}


def test_the_brackets_are_narrow_and_agree_with_the_radii(campaign: Campaign, cases: list[Case]) -> None:
    for case in cases[:FIXED]:
        high = campaign.high(case)
        assert case.low - 1e-5 <= high <= case.low + 1e-3
        safe, falls = case.subject.radius
        assert 0.95 * falls < safe < falls
        if case.epsilon <= safe:
            assert case.low > -1e-5
        if case.epsilon >= falls:
            assert high < 1e-5


@pytest.mark.parametrize("number", [2, 9, 17, 28, 46])
def test_the_solver_finds_the_stored_brackets(number: int, campaign: Campaign, cases: list[Case]) -> None:
    case = cases[number]
    found = campaign.solve(case.number, case.subject, campaign.epsilons(case.subject, 0)[case.number % PER_SUBJECT])
    assert found.epsilon == case.epsilon
    assert found.unstable == case.unstable
    assert found.low == pytest.approx(case.low, abs=1e-4)
    assert campaign.high(found) == pytest.approx(campaign.high(case), abs=1e-4)


@pytest.mark.parametrize("number", [8, 20])
def test_the_solver_agrees_with_both_ends_of_a_radius(number: int, campaign: Campaign, cases: list[Case]) -> None:
    subject = cases[number].subject
    program, image = campaign.of(subject).program, campaign.pixels(subject.sample)
    safe, falls = (smallest_margin(program, *box(image, e), subject.label) for e in subject.radius)
    assert safe.low > -1e-5
    assert falls.high < 0


def test_a_case_survives_its_line(cases: list[Case]) -> None:
    again = from_json(json.loads(to_json(cases[3])))
    assert replace(again, shares=cases[3].shares) == cases[3]
    assert again.shares.tolist() == cases[3].shares.tolist()


# --- the campaign ----------------------------------------------------------------------------------------------------


def test_a_hundred_fixed_cases(campaign: Campaign, cases: list[Case]) -> None:
    records = [campaign.judge(case, strongest(PATIENCE)) for case in cases[:FIXED]]
    assert faults(records) == []
    assert sum(r["verdict"] == "UNKNOWN" for r in records) <= 0.02 * FIXED, table(cases[:FIXED], records)
    assert {r["verdict"] for r in records} >= {"CERTIFIED", "FALSIFIED"}


@pytest.mark.parametrize("number", [1161, 1162])
def test_a_ball_without_any_unstable_relu_is_decided_or_left_open(
    campaign: Campaign, cases: list[Case], number: int
) -> None:
    assert faults([campaign.judge(cases[number], strongest(PATIENCE))]) == []  # a leaf without constraints once raised


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_all_cases(bench: ModuleType, tmp_path: Path) -> None:
    """Set CACTUS_ORACLE_OUT to a file to be able to stop and continue."""
    out = Path(os.environ.get("CACTUS_ORACLE_OUT", tmp_path / "oracle.jsonl"))
    assert bench.main(["--cases", "2000", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    verdicts = {r["case"]: r["verdict"] for r in records if r.get("bound") == strongest().bound}
    assert len(verdicts) == 2000
    assert list(verdicts.values()).count("UNKNOWN") <= 0.02 * len(verdicts)


def test_the_benchmark_continues_where_it_was_cut_off(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "oracle.jsonl"
    options = ["--bound", "crown", "--out", str(out)]
    assert bench.main(["--cases", "6", *options]) == 0
    whole = out.read_text()
    out.write_text(whole[:-20])
    judged: list[int] = []
    judge = Campaign.judge
    monkeypatch.setattr(Campaign, "judge", lambda c, case, s: judged.append(case.number) or judge(c, case, s))
    assert bench.main(["--cases", "8", *options]) == 0
    assert judged == [5, 6, 7]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["case"] for line in lines] == list(range(8))
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-13:] if "/" not in line)
    assert rows["cases"] == "8"
    assert rows["wrong CERTIFIED"] == rows["bound above the bracket"] == "0"


# --- planted faults: the oracle, not the cascade's own check, must find each ------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]
true_relu, true_step, true_ball, true_at = relaxation.relax_relu, interval.step, interval.ball, splits.Region.at
true_split = branch.split


def swapped_slopes(patch: pytest.MonkeyPatch) -> None:
    def relax(box: Box, slope: float = 0.0) -> relaxation.ReluRelaxation:
        right = true_relu(box, slope)
        return relaxation.ReluRelaxation(right.upper_slope, right.lower_slope, right.intercept)

    patch.setattr(relaxation, "relax_relu", relax)


def intercept_too_small(patch: pytest.MonkeyPatch) -> None:
    def relax(box: Box, slope: float = 0.0) -> relaxation.ReluRelaxation:
        right = true_relu(box, slope)
        return relaxation.ReluRelaxation(right.lower_slope, right.upper_slope, 0.5 * right.intercept)

    patch.setattr(relaxation, "relax_relu", relax)


def no_absolute_value_at_the_input(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "absolute", lambda rows: rows)


def signed_radius(patch: pytest.MonkeyPatch) -> None:
    def step(node: Node, params: Params, inputs: list[Box], statistics: object = None) -> Box:
        right = true_step(node, params, inputs)
        if node.op not in ("linear", "conv2d"):
            return right
        signed = {f"{node.name}.weight": params[f"{node.name}.weight"].clamp(min=0)}
        return Box(right.center, true_step(node, params | signed, inputs).radius)

    patch.setattr(interval, "step", step)


def ball_too_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interval, "ball", lambda images, epsilon, domain: true_ball(images, 0.97 * epsilon, domain))


def forgotten_branch_of_a_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "plus", lambda rows, other, shape: other.dense(shape))


def slopes_above_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splits.Region, "at", lambda self, alpha, beta, seen=None: true_at(self, alpha + 0.5, beta, seen))


def multiplier_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splits.Region, "multiplier", staticmethod(lambda sign, beta: sign * beta))


def forgotten_half(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(branch, "split", lambda signs, picks: true_split(signs, picks)[: len(signs)].repeat(2, 1))


def one_class_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(work, "proved", lambda lower, labels: (lower > 0).any(1))


FAULTS: list[tuple[Fault, str]] = [
    (swapped_slopes, "mlp"),
    (intercept_too_small, "conv"),
    (no_absolute_value_at_the_input, "mlp"),
    (signed_radius, "conv"),
    (ball_too_small, "mlp"),
    (forgotten_branch_of_a_sum, "residual"),
    (slopes_above_one, "mlp"),
    (multiplier_of_the_wrong_sign, "conv"),
    (forgotten_half, "conv"),
    (one_class_is_enough, "mlp"),
]


@pytest.fixture
def too_large(
    campaign: Campaign, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], list[str]]:
    """Faults on balls just too large, of which nothing is true but FALSIFIED, and with no attack to say so first."""
    monkeypatch.setattr(work, "check_bounds", lambda *arguments: None)
    monkeypatch.setattr(branch.Branching, "_try", lambda *arguments: None)
    settings = VerificationSettings(attack_steps=0, bound="branch", max_nodes=80)

    def run(kind: str, count: int) -> list[str]:
        some = [c for c in cases[:FIXED] if c.subject.network.startswith(kind) and c.epsilon > c.subject.radius[1]]
        found: list[str] = []
        for case in sorted(some, key=lambda c: c.unstable)[:count]:
            found = faults([campaign.judge(case, settings)])
            if found:
                break
        return found

    return run


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual"])
def test_sound_bounds_are_not_blamed(kind: str, too_large: Callable[[str, int], list[str]]) -> None:
    assert too_large(kind, 2) == []


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_planted_faults_of_bounds_are_found(
    fault: Fault, kind: str, too_large: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = too_large(kind, 8)
    assert "bound above the bracket" in str(found) or "wrong CERTIFIED" in str(found)


def test_a_counterexample_that_is_none_is_found(
    campaign: Campaign, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "replays", lambda model, batch, points: torch.ones(len(points), dtype=torch.bool))
    case = next(c for c in cases if c.epsilon < c.subject.radius[0])
    assert "wrong FALSIFIED" in str(faults([campaign.judge(case, VerificationSettings())]))


def test_a_contradicted_bound_is_reported(
    campaign: Campaign, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_absolute_value_at_the_input(monkeypatch)
    records = [campaign.judge(case, VerificationSettings()) for case in cases[:8]]
    assert any(r["verdict"] == "CONTRADICTED" for r in records)
    assert "contradicted by the cascade's own check" in table(cases[:8], records)


def test_a_crash_is_a_fault_of_its_case(campaign: Campaign, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object, **options: object) -> None:
        raise IndexError("no such neuron")

    monkeypatch.setattr(interval, "margins", crash)
    record = campaign.judge(cases[0], VerificationSettings())
    assert record["faults"] == ["crashed"]
    assert "IndexError: no such neuron" in record["said"]
