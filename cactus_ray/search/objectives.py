"""What a trial is judged by: metrics of its whole curve of points, objectives, constraints, columns of the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cactus_ray.compression.levels import parse_level
from cactus_ray.errors import ConfigError
from cactus_ray.search.pareto import GOALS, relative_hypervolume

LEVEL_METRICS = ("certified_accuracy", "standard_accuracy", "bytes", "macs")
TRIAL_METRICS = ("mean_certified_accuracy", "mean_standard_accuracy", "train_seconds", "hypervolume")
FRONT_COLUMNS = (
    "certified_accuracy", "standard_accuracy", "bytes", "ideal_bits", "macs",
    "n_certified", "n_falsified", "n_unknown", "train_seconds", "verify_seconds",
)  # fmt: skip
_FEWER_IS_BETTER = ("bytes", "macs", "train_seconds")


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric of a trial that the search drives up or down (``goal``: maximize | minimize)."""

    metric: str
    goal: str


@dataclass(frozen=True, slots=True)
class Constraint:
    """A metric of a trial that has to lie in [min, max]; either end may be open."""

    metric: str
    min: float | None = None
    max: float | None = None

    @property
    def name(self) -> str:
        """The constraint in words: ``standard_accuracy@int8 >= 0.9``."""
        ends = [f">= {self.min:g}"] if self.min is not None else []
        return f"{self.metric} " + " and ".join(ends + ([f"<= {self.max:g}"] if self.max is not None else []))

    def violation(self, value: float | None) -> float:
        """How far ``value`` lies outside, 0 or less when inside; infinite for a missing or non-finite value."""
        if value is None or not math.isfinite(value):
            return math.inf
        below = -math.inf if self.min is None else self.min - value
        return max(below, -math.inf if self.max is None else value - self.max)


DEFAULT_OBJECTIVES = (
    Objective("mean_certified_accuracy", "maximize"),
    Objective("mean_standard_accuracy", "maximize"),
)
DEFAULT_FRONT = {"certified_accuracy": "maximize", "bytes": "minimize", "standard_accuracy": "maximize"}


def trial_metrics(
    points: Sequence[Mapping[str, Any]], train_seconds: float, front: Mapping[str, str], reference: Mapping[str, float]
) -> dict[str, float]:
    """The metrics of one trial from the points of its curve, by the names that objectives and constraints use.

    ``hypervolume`` is that of the curve alone, over ``reference`` (see ``pareto.relative_hypervolume``). Raises
    ValueError without any point.
    """
    if not points:
        raise ValueError("a trial without points has no metrics")
    metrics = {f"{column}@{p['level']}": float(p[column]) for p in points for column in LEVEL_METRICS}
    for column in ("certified_accuracy", "standard_accuracy"):
        metrics[f"mean_{column}"] = sum(float(p[column]) for p in points) / len(points)
    metrics["train_seconds"] = float(train_seconds)
    metrics["hypervolume"] = relative_hypervolume(points, front, reference)
    return metrics


def feasible(metrics: Mapping[str, float], constraints: Sequence[Constraint]) -> dict[str, float]:
    """Violation of every constraint by name; 0 or less is met, infinite where the metric is missing or not finite."""
    return {c.name: c.violation(metrics.get(c.metric)) for c in constraints}


# --- from plain data -----------------------------------------------------------------------------------------------


def parse_metric(text: Any, levels: Sequence[str], path: str) -> str:
    """The canonical name of a metric that a trial with these (canonical) levels reports; ConfigError otherwise."""
    known = f"{', '.join(TRIAL_METRICS)}, or one of {', '.join(LEVEL_METRICS)} with @LEVEL, where LEVEL is one of the "
    known = f"a metric that is reported: {known}levels {', '.join(levels)}"
    if not isinstance(text, str):
        raise ConfigError(path, text, known)
    if text in TRIAL_METRICS:
        return text
    kind, at, level = text.partition("@")
    if not at or kind not in LEVEL_METRICS:
        raise ConfigError(path, text, f"{known} (nothing reports {text!r})")
    try:
        canonical = str(parse_level(level, path))
    except ConfigError as error:
        raise ConfigError(path, text, f"a level after the @: {error.expected}") from None
    if canonical not in levels:
        raise ConfigError(path, text, f"{known} (nothing reports {text!r})")
    return f"{kind}@{canonical}"


def parse_objectives(data: Any, levels: Sequence[str], path: str = "objectives") -> tuple[Objective, ...]:
    """Objectives from a list of {metric, goal}; the goal of a known metric may be left out."""
    found: list[Objective] = []
    for i, entry in enumerate(_entries(data, path, "{metric: mean_certified_accuracy, goal: maximize}")):
        here = f"{path}[{i}]"
        _only(entry, ("metric", "goal"), here)
        metric = parse_metric(entry.get("metric"), levels, f"{here}.metric")
        default = "minimize" if metric.split("@")[0] in _FEWER_IS_BETTER else "maximize"
        goal = entry.get("goal", default)
        if goal not in GOALS:
            raise ConfigError(f"{here}.goal", goal, f"one of {', '.join(GOALS)}")
        if metric in (o.metric for o in found):
            raise ConfigError(f"{here}.metric", metric, "each metric once")
        found.append(Objective(metric, goal))
    if not found:
        raise ConfigError(path, data, "at least one {metric: ..., goal: maximize | minimize}")
    return tuple(found)


def parse_constraints(data: Any, levels: Sequence[str], path: str = "constraints") -> tuple[Constraint, ...]:
    """Constraints from a list of {metric, min, max} with at least one of the two ends."""
    found: list[Constraint] = []
    for i, entry in enumerate(_entries(data, path, "{metric: mean_standard_accuracy, min: 0.9}")):
        here = f"{path}[{i}]"
        _only(entry, ("metric", "min", "max"), here)
        metric = parse_metric(entry.get("metric"), levels, f"{here}.metric")
        ends = {end: _number(entry[end], f"{here}.{end}") for end in ("min", "max") if end in entry}
        if not ends:
            raise ConfigError(here, dict(entry), "min, max or both")
        if "min" in ends and "max" in ends and ends["min"] > ends["max"]:
            raise ConfigError(f"{here}.min", entry["min"], f"at most max = {entry['max']}")
        if metric in (c.metric for c in found):
            raise ConfigError(f"{here}.metric", metric, "each metric once, with min and max together")
        found.append(Constraint(metric, **ends))
    return tuple(found)


def parse_front(data: Any, path: str = "front") -> dict[str, str]:
    """Columns of points.csv that span the front, each with its goal."""
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(path, data, "a mapping such as {certified_accuracy: maximize, bytes: minimize}")
    for column, goal in data.items():
        if column not in FRONT_COLUMNS:
            raise ConfigError(f"{path}.{column}", column, f"a column of points.csv: {', '.join(FRONT_COLUMNS)}")
        if goal not in GOALS:
            raise ConfigError(f"{path}.{column}", goal, f"one of {', '.join(GOALS)}")
    return dict(data)


def _entries(data: Any, path: str, example: str) -> list[Mapping[str, Any]]:
    if not isinstance(data, list):
        raise ConfigError(path, data, f"a list, for example [{example}]")
    for i, entry in enumerate(data):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{path}[{i}]", entry, f"a mapping such as {example}")
    return data


def _only(entry: Mapping[str, Any], keys: Sequence[str], path: str) -> None:
    for key in entry:
        if key not in keys:
            raise ConfigError(f"{path}.{key}", entry[key], f"no such key; one of {', '.join(keys)}")


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(path, value, "a finite number")
    return float(value)
