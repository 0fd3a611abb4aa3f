"""Which points can no longer reach the front, whatever dear verification finds, so that it need not look.

Fidelities are one ladder: epochs (``halving``), cheap verdicts on every sample, dear ones on what these left open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cactus_ray.search.objectives import Constraint, feasible
from cactus_ray.search.pareto import Array, Front, losses
from cactus_ray.search.records import Records

Point = Mapping[str, Any]


class Rivals:
    """The front of all complete trials, and that of those that keep all constraints: whoever is beaten by anybody there
    is beaten by one of these.

    A trial that keeps them competes in both fronts, so its points are ruled out by those of the second alone; one that
    breaks a constraint, whatever dear verification finds, competes in the first.
    """

    def __init__(self, front: Mapping[str, str], constraints: Sequence[Constraint] = ()) -> None:
        self.constraints = tuple(constraints)
        self.all = _Leading(front)
        self.within = _Leading(front) if self.constraints else self.all

    @staticmethod
    def of_records(front: Mapping[str, str], constraints: Sequence[Constraint], records: Records) -> Rivals:
        """Those among the complete trials of a run."""
        rivals = Rivals(front, constraints)
        rivals.all.add(records.points())
        if rivals.constraints:
            complete = (trial for trial in records.drawn() if trial.status == "completed")
            rivals.within.add([point for trial in complete if rivals._kept(trial.metrics) for point in trial.points])
        return rivals

    def add(self, points: Sequence[Point], metrics: Mapping[str, float]) -> None:
        """Take up the points of a trial that is complete, with its metrics."""
        self.all.add(points)
        if self.constraints and self._kept(metrics):
            self.within.add(points)

    def _kept(self, metrics: Mapping[str, float]) -> bool:
        return all(violation <= 0 for violation in feasible(metrics, self.constraints).values())

    def of(self, point: Point, curve: Sequence[Point]) -> Point | None:
        """Who beats ``point`` for good, among these and the other points of its trial, whose ``curve`` it is part of.

        None also where its open samples may decide whether its trial keeps a constraint.
        """
        kept = {c: standing(c, curve) for c in self.constraints}
        if any(found is None and reads(c.metric, str(point["level"])) for c, found in kept.items()):
            return None
        siblings = [other for other in curve if other["level"] != point["level"]]
        return (self.all if False in kept.values() else self.within).better(point, siblings)


class _Leading:
    """A front that grows, with the worst outcome of each of its points as losses, by its id."""

    def __init__(self, front: Mapping[str, str]) -> None:
        self.front = Front(front)
        self.worst: dict[int, Array] = {}

    def add(self, points: Sequence[Point]) -> None:
        off = {id(point) for point in self.front.add(points)}
        for gone in off:
            self.worst.pop(gone, None)
        on = [point for point in points if id(point) not in off]
        self.worst |= zip(map(id, on), _worst(on, self.front.front), strict=True)

    def better(self, point: Point, siblings: Sequence[Point]) -> Point | None:
        front = self.front.front
        rows = [*self.worst.values(), *_worst(siblings, front)]
        return _first_better(point, [*self.front.points, *siblings], rows, front)


def standing(constraint: Constraint, points: Sequence[Point]) -> bool | None:
    """Whether a trial with this curve keeps a constraint, whatever its open samples turn out to be; None where they
    decide that. A hypervolume is taken to be open.
    """
    kind, _, level = constraint.metric.partition("@")
    if kind == "hypervolume":
        return None
    read = [ends(p, kind.removeprefix("mean_")) for p in points if level in ("", p["level"])]
    read = read[:1] if kind == "train_seconds" else read  # the same at every level
    low, high = (sum(values) / len(read) for values in zip(*read, strict=True))  # as ``objectives.trial_metrics``
    if constraint.violation(low) <= 0 and constraint.violation(high) <= 0:
        return True
    reachable = (constraint.max is None or low <= constraint.max) and (constraint.min is None or high >= constraint.min)
    return None if reachable else False


def reads(metric: str, level: str) -> bool:
    """Whether a metric of a trial is about a level of it."""
    return metric.partition("@")[2] in ("", level)


def ends(point: Mapping[str, Any], column: str) -> tuple[float, float]:
    """The least and the largest value that a column of a point can have once its open samples are decided.

    What is certified, falsified or measured stays; seconds of verification can only grow.
    """
    value = point.get(column)
    if value is None:
        return math.nan, math.nan
    left = point["n_unknown"]
    match column:
        case "n_certified" | "n_falsified":
            return value, value + left
        case "certified_accuracy":
            return value, (point["n_certified"] + left) / point["samples"]
        case "n_unknown":
            return 0, value
        case "verify_seconds":
            return value, math.inf
    return value, value


def bettered_by(
    point: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], front: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """A rival whose worst outcome dominates the best one of ``point``, or None: then the point may reach the front.

    ``rivals`` are points of trials that are complete, or of the same trial: a trial that fails takes its points along.
    A point that is beaten here is beaten however its open samples are decided, also by somebody on the front.
    """
    return _first_better(point, rivals, list(_worst(rivals, front)), front)


def _worst(rivals: Sequence[Point], front: Mapping[str, str]) -> Array:
    """Their worst outcomes [rivals, columns], smaller is better."""
    return losses([{c: ends(r, c)[0 if goal == "maximize" else 1] for c, goal in front.items()} for r in rivals], front)


def _first_better(
    point: Point, rivals: Sequence[Point], rows: Sequence[Array], front: Mapping[str, str]
) -> Point | None:
    if not rivals:
        return None
    best = {c: ends(point, c)[1 if goal == "maximize" else 0] for c, goal in front.items()}
    mine, others = losses([best], front)[0], np.stack(rows)
    beaten = np.flatnonzero((others <= mine).all(axis=1) & (others < mine).any(axis=1))
    return rivals[int(beaten[0])] if len(beaten) else None
