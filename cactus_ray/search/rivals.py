"""Which points can no longer reach the front, whatever dear verification finds, so that it need not look.

Fidelities are one ladder: epochs (``halving``), cheap verdicts on every sample, dear ones on what these left open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cactus_ray.search.pareto import Array, Front, losses

Point = Mapping[str, Any]


class Rivals:
    """The front of all complete trials: whoever is beaten by anybody is beaten by one of these."""

    def __init__(self, front: Mapping[str, str], points: Sequence[Point]) -> None:
        self.leading = Front(front)
        self.worst: dict[int, Array] = {}  # of a point on the front, by its id: its worst outcome as losses
        self.add(points)

    def add(self, points: Sequence[Point]) -> None:
        """Take up the points of a trial that is complete."""
        off = {id(point) for point in self.leading.add(points)}
        for gone in off:
            self.worst.pop(gone, None)
        on = [point for point in points if id(point) not in off]
        self.worst |= zip(map(id, on), _worst(on, self.leading.front), strict=True)

    def of(self, point: Point, siblings: Sequence[Point]) -> Point | None:
        """Who beats ``point`` for good, among these and the other points of its trial."""
        front = self.leading.front
        rows = [*self.worst.values(), *_worst(siblings, front)]
        return _first_better(point, [*self.leading.points, *siblings], rows, front)


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
