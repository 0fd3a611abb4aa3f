"""What a trial is judged by."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cactus_ray.search.objectives import (
    FRONT_COLUMNS,
    LEVEL_METRICS,
    TRIAL_METRICS,
    Constraint,
    feasible,
    parse_metric,
    trial_metrics,
)
from cactus_ray.search.store import COLUMNS

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}
REFERENCE = {"certified_accuracy": 0.0, "bytes": 1000.0}


def point(level: str, certified: float, standard: float, size: int) -> dict[str, Any]:
    accuracies = {"certified_accuracy": certified, "standard_accuracy": standard}
    return {"level": level, **accuracies, "bytes": size, "macs": 10 * size}


def test_a_trial_reports_every_metric_that_a_space_may_name() -> None:
    points = [point("dense", 0.8, 0.9, 500), point("int8", 0.6, 1.0, 100)]
    metrics = trial_metrics(points, 12.5, FRONT, REFERENCE)
    assert metrics["certified_accuracy@int8"] == 0.6
    assert metrics["bytes@dense"] == 500.0
    assert metrics["macs@int8"] == 1000.0
    assert metrics["mean_certified_accuracy"] == pytest.approx(0.7)
    assert metrics["mean_standard_accuracy"] == pytest.approx(0.95)
    assert metrics["train_seconds"] == 12.5
    assert metrics["hypervolume"] == pytest.approx(0.8 * 0.5 + 0.6 * 0.4)
    names = {*TRIAL_METRICS, *(f"{kind}@{level}" for kind in LEVEL_METRICS for level in ("dense", "int8"))}
    assert set(metrics) == names == {parse_metric(name, ("dense", "int8"), "x") for name in names}


def test_metrics_need_points() -> None:
    with pytest.raises(ValueError, match="without points"):
        trial_metrics([], 1.0, FRONT, REFERENCE)


def test_every_column_of_the_front_is_one_of_the_table() -> None:
    assert set(FRONT_COLUMNS) <= set(COLUMNS)


@pytest.mark.parametrize(
    ("constraint", "value", "violation"),
    [
        (Constraint("m", min=0.9), 0.95, -0.05),
        (Constraint("m", min=0.9), 0.7, 0.2),
        (Constraint("m", max=2.0), 3.0, 1.0),
        (Constraint("m", min=1.0, max=2.0), 1.25, -0.25),
        (Constraint("m", min=1.0, max=2.0), 2.0, 0.0),
        (Constraint("m", min=0.9), math.nan, math.inf),
        (Constraint("m", min=0.9), None, math.inf),
    ],
)
def test_violations(constraint: Constraint, value: float | None, violation: float) -> None:
    metrics = {} if value is None else {"m": value}
    assert feasible(metrics, [constraint]) == {constraint.name: pytest.approx(violation)}


def test_a_constraint_has_a_name_to_be_read() -> None:
    assert Constraint("standard_accuracy@int8", min=0.9).name == "standard_accuracy@int8 >= 0.9"
    assert Constraint("bytes@int8", min=1.0, max=40000.0).name == "bytes@int8 >= 1 and <= 40000"
