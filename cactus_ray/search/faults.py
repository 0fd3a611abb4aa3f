"""What makes the record of a trial full and finite, and what is wrong with one that is not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from cactus_ray.search.records import COLUMNS

_TEXT = ("trial", "level", "method", "split", "config_hash")
_COUNTS = ("samples", "n_certified", "n_falsified", "n_unknown", "bytes", "ideal_bits", "macs")


def fault_of(event: Mapping[str, Any]) -> str | None:
    """Why a ``completed`` event is no full, finite record of a trial; None if it is one."""
    points, metrics = event.get("points"), event.get("metrics")
    if not isinstance(points, Sequence) or not points or not isinstance(metrics, Mapping) or not metrics:
        return "no points or no metrics"
    for name, value in metrics.items():
        if not is_finite(value):
            return f"metric {name} is {value!r}"
    return fault_of_points(event)


def fault_of_points(event: Mapping[str, Any]) -> str | None:
    """Why the points of an event are not what points have to be; None if they are, also where there are none."""
    points = event.get("points")
    if not isinstance(points, Sequence):
        return "no points"
    for point in points:
        if fault := _point_fault(point, event.get("trial")):
            return f"point {point.get('level')!r}: {fault}"
    levels = [point["level"] for point in points]
    return None if len(set(levels)) == len(levels) else f"a level twice among {levels}"


def _point_fault(point: Mapping[str, Any], trial: Any) -> str | None:
    for column in COLUMNS:
        if column != "on_front" and column not in point:
            return f"no {column}"
    for column, value in point.items():
        if column in _TEXT and not isinstance(value, str):
            return f"{column} is {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{column} is {value!r}"
        if column in _COUNTS and (type(value) is not int or value < 0):
            return f"{column} is {value!r}, no count"
        if column in ("standard_accuracy", "certified_accuracy") and not (is_finite(value) and 0 <= value <= 1):
            return f"{column} is {value!r}, no fraction"
        if column in ("train_seconds", "verify_seconds") and not is_finite(value):
            return f"{column} is {value!r}"
    if point["trial"] != trial:
        return f"it belongs to trial {point['trial']}"
    if point["n_certified"] + point["n_falsified"] + point["n_unknown"] != point["samples"] or not point["samples"]:
        return "its verdicts do not add up to its samples"
    if abs(point["certified_accuracy"] - point["n_certified"] / point["samples"]) > 1e-9:
        return "its certified accuracy is not n_certified / samples"
    return None


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
