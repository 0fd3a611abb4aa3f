"""Seeds of front members: when dominance is settled, and who is trained again. Points are made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cactus_ray.search.objectives import Constraint
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.replicates import Replicate, Standings, curves_by_seed, due, replicate_seed, seen_again
from cactus_ray.search.store import with_front

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}


def point(trial: str, level: str, certified: float, size: int) -> dict[str, Any]:
    return {"trial": trial, "level": level, "certified_accuracy": certified, "standard_accuracy": 0.9, "bytes": size}


def run(**networks: list[dict[str, tuple[float, int]] | None]) -> Records:
    """A run: for each trial its networks seed by seed, as level -> (certified, bytes); None: that seed failed."""
    records = Records()
    for number, (trial, seeds) in enumerate(networks.items(), 1):
        for k, levels in enumerate(seeds, 1):
            name = trial if k == 1 else f"{trial}-s{k}"
            record = TrialRecord(name, number, "completed" if levels else "failed", of=None if k == 1 else trial)
            record.replicate = k
            record.points = [point(name, level, *value) for level, value in (levels or {}).items()]
            record.metrics = {"standard_accuracy@a": 0.9}
            records.trials[name] = record
    return records


def one(*values: float, size: int = 100) -> list[dict[str, tuple[float, int]] | None]:
    """A trial with a single level."""
    return [{"a": (value, size)} for value in values]


def standing(records: Records, trial: str, level: str = "a") -> str:
    return Standings(curves_by_seed(records), FRONT).of(trial, level)


def test_seeds_are_derived_and_differ() -> None:
    seeds = [replicate_seed(seed, number) for seed in range(50) for number in (2, 3)]
    assert seeds[:2] == [replicate_seed(0, 2), replicate_seed(0, 3)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_nothing_is_settled_by_one_seed() -> None:
    records = run(x=one(0.9), y=one(0.1))
    assert (standing(records, "x"), standing(records, "y")) == ("open", "open")


def test_a_gap_beyond_the_spread_is_settled_and_one_within_is_not() -> None:
    far = run(x=one(0.90, 0.91, 0.89), y=one(0.50, 0.51, 0.49))
    assert (standing(far, "x"), standing(far, "y")) == ("non-dominated", "dominated")
    near = run(x=one(0.90, 0.94, 0.86), y=one(0.89, 0.85, 0.93))
    assert (standing(near, "x"), standing(near, "y")) == ("open", "open")


def test_the_interval_is_students_for_pooled_seeds() -> None:
    """Spread 0.01 in both, 2 and 3 seeds: 3 degrees of freedom, 3.182 * s * sqrt(1/2 + 1/3) in Student's table."""
    low, high = [0.50 - 0.01, 0.50 + 0.01], [-0.01, 0.0, 0.01]
    spread = np.sqrt((2 * 0.01**2 + 2 * 0.01**2) / 3)
    reach = 3.182 * spread * np.sqrt(1 / 2 + 1 / 3)
    for gap, expected in ((reach * 1.02, "dominated"), (reach * 0.98, "open")):
        records = run(x=one(*low), y=one(*(0.50 + gap + value for value in high)))
        assert standing(records, "x") == expected


def test_a_better_size_alone_keeps_a_point_from_being_dominated() -> None:
    records = run(x=one(0.90, 0.91, 0.89, size=200), y=one(0.50, 0.51, 0.49, size=100))
    assert (standing(records, "x"), standing(records, "y")) == ("non-dominated", "non-dominated")


def test_a_rival_with_one_seed_has_the_interval_of_a_single_draw() -> None:
    replicated = one(0.90, 0.91, 0.89)
    assert standing(run(x=replicated, y=one(0.91)), "x") == "open"
    assert standing(run(x=replicated, y=one(0.60)), "x") == "non-dominated"


def test_levels_of_one_trial_are_compared_seed_by_seed() -> None:
    """Seeds move both levels by far more than lies between them, but always together."""
    pairs = [{"a": (v, 100), "b": (v - 0.02 + e, 100)} for v, e in ((0.5, 0.0), (0.7, 0.001), (0.9, -0.001))]
    records = run(x=[*pairs])
    assert (standing(records, "x", "a"), standing(records, "x", "b")) == ("non-dominated", "dominated")


def test_points_that_are_the_same_without_any_variance_stand_together() -> None:
    records = run(x=[{"a": (0.9, 100), "b": (0.9, 100)}] * 2)
    assert (standing(records, "x", "a"), standing(records, "x", "b")) == ("non-dominated", "non-dominated")


def test_every_member_of_the_front_gets_a_second_seed_and_others_none() -> None:
    records = run(x=one(0.9, size=200), y=one(0.8, size=100), z=one(0.7, size=300))
    assert due(records, FRONT, (), 1) == []
    assert due(records, FRONT, (), 3) == [Replicate("x", 2), Replicate("y", 2)]


def test_a_round_is_the_same_however_much_of_it_has_been_done() -> None:
    """Seeds of a round decide nothing in the same round: a driver that takes over asks for the rest of it."""
    whole = {"x": one(0.90, 0.905), "y": one(0.5, 0.5), "z": one(0.89, 0.88, size=90)}
    records = run(**{**whole, "y": one(0.5, size=50), "z": one(0.89, size=90)})
    assert due(records, FRONT, (), 3) == [Replicate("y", 2), Replicate("z", 2)]
    records.trials["x-s2"].status = "running"
    assert due(records, FRONT, (), 3) == [Replicate("y", 2), Replicate("z", 2)]
    waiting = run(**{**whole, "y": one(0.5, 0.5, size=50)})
    waiting.trials["x-s2"].status = "running"
    assert due(waiting, FRONT, (), 3) == []  # nobody is asked for a third seed while a second one trains


def test_only_what_is_open_gets_a_third_seed_and_the_last_is_the_last() -> None:
    """x may be no better than y, which is smaller; y and z are smaller than whoever may be better."""
    near = {"x": one(0.90, 0.88), "y": one(0.8999, 0.91, size=99), "z": one(0.5, 0.51, size=10)}
    records = run(**near)
    assert due(records, FRONT, (), 2) == []
    assert due(records, FRONT, (), 3) == [Replicate("x", 3)]
    assert due(run(**{**near, "x": [*near["x"], None]}), FRONT, (), 3) == []


def test_a_replicate_that_failed_has_had_its_turn() -> None:
    records = run(x=[*one(0.9), None], y=[*one(0.8, size=50), None])
    assert due(records, FRONT, (), 3) == [Replicate("x", 3), Replicate("y", 3)]


def test_the_front_of_the_trials_that_keep_the_constraints_has_members_too() -> None:
    records = run(x=one(0.9), y=one(0.8))
    records.trials["x"].metrics = {"standard_accuracy@a": 0.2}
    constraint = Constraint("standard_accuracy@a", min=0.5)
    assert due(records, FRONT, (), 2) == [Replicate("x", 2)]
    assert due(records, FRONT, (constraint,), 2) == [Replicate("x", 2), Replicate("y", 2)]


def test_tables_have_mean_and_ends_over_seeds_and_replicates_are_no_points() -> None:
    records = run(x=one(0.90, 0.80, 0.85), y=one(0.3))
    rows = {row["trial"]: row for row in seen_again(records, with_front(records, FRONT), FRONT)}
    assert set(rows) == {"x", "y"}
    assert rows["x"]["certified_accuracy"] == 0.90
    assert rows["x"]["seeds"] == 3
    assert rows["x"]["certified_accuracy_mean"] == pytest.approx(0.85)
    assert (rows["x"]["certified_accuracy_min"], rows["x"]["certified_accuracy_max"]) == (0.80, 0.90)
    assert (rows["x"]["bytes_mean"], rows["x"]["over_seeds"]) == (100.0, "non-dominated")
    assert "seeds" not in rows["y"]
    assert "over_seeds" not in rows["y"]
