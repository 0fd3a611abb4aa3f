"""Limits count work and not downtime; a plateau counts complete trials that gained nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from course import REFERENCE, SPACE, begin, result, resume, started

from cactus_ray.search.budget import Budget, Plateau, train_seconds
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, read_records

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}


def space(search: dict[str, Any], **resources: Any) -> Space:
    resources = {**SPACE["resources"], **resources}
    return parse_space({**SPACE, "search": {**SPACE["search"], **search}, "resources": resources}, "course.yaml")


def write(run: Path, times: list[tuple[str, float, dict[str, Any]]]) -> Records:
    lines = [json.dumps({"event": kind, "time": time, **more}) for kind, time, more in times]
    (run / "trials.jsonl").write_text("\n".join(lines) + "\n")
    return read_records(run)


def test_hours_are_those_in_which_drivers_worked(tmp_path: Path) -> None:
    begun = {"trial": "t0001", "number": 1}
    records = write(
        tmp_path,
        [
            ("study", 0.0, {"schema": 1}), ("driver", 10.0, {}), ("started", 20.0, begun),
            ("started", 3610.0, {"trial": "t0002", "number": 2}),  # and then it was killed
            ("driver", 900_000.0, {}), ("finished", 900_100.0, {"status": "interrupted", "seconds": 1800.0}),
        ],
    )  # fmt: skip
    assert sum(records.drivers) == pytest.approx(3600 + 1800)
    now = [500.0]
    budget = Budget(space({"max_hours": 2.0}), records, clock=lambda: now[0])
    assert budget.hours == pytest.approx(1.5)
    now[0] += 1700
    assert budget.over() is None
    now[0] += 100
    assert budget.over() == "search.max_hours: 2 of 2 hours of work"
    assert budget.enough() == budget.over()


def test_gpu_hours_are_those_of_workers_and_verifiers_whatever_became_of_the_trial() -> None:
    budget = Budget(space({"max_gpu_hours": 1.0}, workers=2, gpus_per_worker=0.5, gpus_per_verifier=0.25), Records())
    budget.event({"event": "epoch", "trial": "t0001", "metrics": {"seconds": 1000.0}})
    budget.event({"event": "epoch", "trial": "t0002", "metrics": {"seconds": 800.0}})
    budget.event({"event": "trained", "trial": "t0001", "train_seconds": 1800.0})
    assert budget.gpu_hours == pytest.approx(2600 / 3600)
    budget.event({"event": "verdicts", "ledger": {"attack": 3000.0, "ibp": 500.0}})
    assert budget.over() is None
    budget.event({"event": "lost", "seconds": 500.0})
    assert budget.over() == "search.max_gpu_hours: 1 of 1 hours of GPUs"


def test_trials_that_share_a_gpu_cost_their_part_of_it(tmp_path: Path) -> None:
    tight = space({"trials": 9, "max_gpu_hours": 1.0}, gpus_per_worker=1.0)
    study = begin(tight, tmp_path)
    first, second = started(study).id, started(study).id
    study.epoch(first, 1, 2, {"seconds": 3600.0}, gpus=0.25)
    study.epoch(second, 1, 2, {"seconds": 1800.0})
    assert study.budget.gpu_hours == pytest.approx(0.75)
    assert Budget(tight, read_records(tmp_path)).gpu_hours == pytest.approx(0.75)


def test_a_plateau_is_a_run_of_trials_that_gain_too_little() -> None:
    plateau = Plateau(FRONT, 0.1)
    plateau.reference = {"certified_accuracy": 0.0, "bytes": 100.0}
    idle = []
    for certified in (0.5, 0.52, 0.54, 0.56, 0.4):
        plateau.add([{"certified_accuracy": certified, "bytes": 50}])
        idle.append(plateau.idle)
    assert idle == [0, 1, 2, 0, 1]  # three small gains together are one that counts


@pytest.mark.parametrize("search", [{"max_trials": 2}, {"plateau": 1}])
def test_no_further_trial_starts_and_what_is_in_flight_ends(search: dict[str, Any], tmp_path: Path) -> None:
    limited = space({"trials": 9, **search})
    study = begin(limited, tmp_path)
    trials = [started(study).id, started(study).id]
    for number, trial in enumerate(trials):
        assert not study.done
        for chunk in study.trained(trial, {"last": bytes([number])}, "last", 1, 2.0):
            study.verified(result(chunk))
    assert study.next_trial() is None
    assert study.done
    study.end("completed", 1.0)
    reason = str((read_records(tmp_path).finished or {})["reason"])
    assert reason.startswith(f"search.{next(iter(search))}: ")
    assert resume(limited, tmp_path).done
    assert not resume(space({"trials": 9}), tmp_path).done  # without the limit it goes on


def test_a_study_at_its_limit_of_hours_starts_nothing_and_forgets_nothing(tmp_path: Path) -> None:
    limited = space({"max_hours": 1e-9})
    study = begin(limited, tmp_path)
    assert study.next_trial() is None
    assert study.done
    assert study.reference == REFERENCE


def test_work_that_was_done_twice_or_lost_counts_and_downtime_does_not(tmp_path: Path) -> None:
    trial = {"trial": "t0001"}

    def epoch(number: int, seconds: float | None) -> dict[str, Any]:
        return {**trial, "epoch": number, "epochs": 3, "metrics": {"seconds": seconds}}

    events = [
        ("study", 0.0, {"schema": 1}), ("driver", 0.0, {}), ("started", 1.0, {**trial, "number": 1}),
        ("begun", 5.0, {**trial, "epoch": 0}), ("epoch", 15.0, epoch(1, 9.0)), ("epoch", 25.0, epoch(2, 9.0)),
        ("alive", 31.0, {}),  # killed: 6 s are known to be lost
        ("driver", 1000.0, {}), ("begun", 1010.0, {**trial, "epoch": 1}), ("epoch", 1020.0, epoch(2, 8.0)),
        ("died", 1023.0, {**trial, "epoch": 2, "reason": "killed"}),  # 3 s
        ("begun", 1030.0, {**trial, "epoch": 2}), ("epoch", 1035.0, epoch(3, None)),
        ("finished", 1037.0, {"status": "interrupted", "seconds": 37.0}),  # 2 s
        ("driver", 2000.0, {}), ("begun", 2001.0, {**trial, "epoch": 2}),
        ("epoch", 2010.0, epoch(3, 7.0)),
        ("trained", 2011.0, {**trial, "train_seconds": 24.0, "checkpoint": "c", "sha256": "s"}),
        ("failed", 2500.0, {**trial, "error": "no verifier survived"}),  # it did not train then
    ]  # fmt: skip
    records = write(tmp_path, events)
    spent = 9 + 9 + 6 + 8 + 3 + 2 + 7
    assert train_seconds(records.trials["t0001"]) == pytest.approx(spent)
    limited = space({"max_gpu_hours": 1.0}, gpus_per_worker=0.5)
    assert Budget(limited, records).gpu_hours == pytest.approx(0.5 * spent / 3600)
    halves = [Budget(limited, write(tmp_path, events[:cut])) for cut in range(1, len(events))]
    for cut, budget in enumerate(halves, 1):  # what a driver follows is what the next one reads
        for kind, time, more in events[cut:]:
            budget.event({"event": kind, "time": time, "reference_point": {}, **more})
        assert budget.gpu_hours == pytest.approx(0.5 * spent / 3600)
