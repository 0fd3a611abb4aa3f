"""Which points are on the front, how much they cover, and which one is the knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GOALS = ("maximize", "minimize")
Array = npt.NDArray[np.float64]
_FEW = 64


def losses(points: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> Array:
    """Points as an array [points, columns of ``front``] in which smaller is better; missing or non-finite is NaN."""
    rows = np.full((len(points), len(front)), np.nan)
    for j, (column, goal) in enumerate(front.items()):
        if goal not in GOALS:
            raise ValueError(f"goal of {column} is {goal!r}; expected one of {', '.join(GOALS)}")
        for i, point in enumerate(points):
            value = point.get(column)
            rows[i, j] = np.nan if value is None else float(value) * (-1.0 if goal == "maximize" else 1.0)
    rows[~np.isfinite(rows)] = np.nan
    return rows


def non_dominated(points: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> list[bool]:
    """For each point whether no other is at least as good in every column and better in one.

    ``front``: column -> "maximize" | "minimize". Equal points stand or fall together. A point that lacks a column or
    has a non-finite value there is never on the front and dominates nothing.
    """
    return [bool(keep) for keep in _non_dominated(losses(points, front))]


def _non_dominated(rows: Array) -> npt.NDArray[np.bool_]:
    """In lexicographic order points are dominated by earlier ones only: each that is left drops all that it beats.

    A few, such as those of one trial, are compared all with all at once.
    """
    keep: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    valid = rows[keep]  # NaN rows are out, so that every comparison below is between numbers
    if len(valid) <= _FEW:
        keep[keep] = ~beaten(valid, valid)
        return keep
    numbers = np.lexsort(valid.T[::-1]) if valid.size else np.arange(len(valid))
    left, place = valid[numbers], 0
    while place < len(left):
        row = left[place]
        off = (row <= left).all(axis=1) & (row < left).any(axis=1)
        if off.any():
            left, numbers = left[~off], numbers[~off]
        place += 1
    leading = np.zeros(len(valid), dtype=bool)
    leading[numbers] = True
    keep[keep] = leading
    return keep


class Front:
    """The non-dominated points of all that were added, in the order in which they came: ``non_dominated``, kept.

    A point costs one comparison with the points that are on the front, however many were added before.
    """

    def __init__(self, front: Mapping[str, str], points: Sequence[Mapping[str, Any]] = ()) -> None:
        self.front = dict(front)
        self.points: list[Mapping[str, Any]] = []
        self.rows: Array = np.empty((0, len(front)))  # of the points, smaller is better
        self.add(points)

    def add(self, points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Take up points; those of them that are not on the front, and those that leave it."""
        rows = losses(points, self.front)
        new = _non_dominated(rows)
        new[new] = ~beaten(rows[new], self.rows)
        stay = ~beaten(self.rows, rows[new])
        off = [p for p, on in zip(points, new, strict=True) if not on]
        if len(off) == len(points):
            return off
        kept = self.points
        if not stay.all():
            off += [p for p, on in zip(kept, stay, strict=True) if not on]
            kept = [p for p, on in zip(kept, stay, strict=True) if on]
        self.points = kept + [p for p, on in zip(points, new, strict=True) if on]
        self.rows = np.concatenate([self.rows[stay], rows[new]])
        return off


def beaten(rows: Array, rivals: Array) -> npt.NDArray[np.bool_]:
    """Which of the finite ``rows`` are dominated by one of the finite ``rivals``."""
    if not len(rows) or not len(rivals):
        return np.zeros(len(rows), dtype=bool)
    mine, theirs, axis = rows.T[:, :, None], rivals.T[:, None, :].copy(), 1
    if len(rows) > len(rivals):  # numpy is slow where the last axis is short
        mine, theirs, axis = rows.T[:, None, :].copy(), rivals.T[:, :, None], 0
    worse, better = theirs[0] > mine[0], theirs[0] < mine[0]
    for their, my in zip(theirs[1:], mine[1:], strict=True):
        worse |= their > my
        better |= their < my
    return np.asarray((better & ~worse).any(axis=axis), dtype=bool)


def hypervolume(values: Array, reference: Array | Sequence[float]) -> float:
    """Exact volume that ``values`` [n, m] dominate below ``reference`` [m]; every column is minimised.

    Values that do not improve on the reference in every column add nothing. Raises ValueError for non-finite input.
    Slices along the last column (Zitzler 1999): O(n^(m-1) log n), meant for a few columns.
    """
    points, bound = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    points = points.reshape(-1, bound.size)
    if not (np.isfinite(points).all() and np.isfinite(bound).all()):
        raise ValueError("the hypervolume needs finite values and a finite reference point")
    points = points[(points < bound).all(axis=1)]
    return _volume(points[_non_dominated(points)], bound) if len(points) else 0.0


def _volume(points: Array, bound: Array) -> float:
    if bound.size == 1:
        return float(bound[0] - points[:, 0].min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    if bound.size == 2:
        best = np.minimum.accumulate(points[:, 0])
        heights = np.diff(np.append(points[:, 1], bound[1]))
        return float(((bound[0] - best) * heights).sum())
    heights = np.diff(np.append(points[:, -1], bound[-1]))
    slices = (h * _volume(points[: i + 1, :-1], bound[:-1]) for i, h in enumerate(heights) if h > 0)
    return float(sum(slices))


def relative_hypervolume(
    points: Sequence[Mapping[str, Any]], front: Mapping[str, str], reference: Mapping[str, float]
) -> float:
    """Hypervolume of points in the columns of ``front``, over the fixed ``reference`` point.

    A minimised column counts as the share of the reference that is saved, a maximised one in its own unit above the
    reference: with accuracies and bytes the result lies in [0, 1]. Points with a missing or non-finite value add
    nothing. Raises ValueError if the reference lacks a column or is not positive where a column is minimised.
    """
    rows = losses(points, front)
    bound = np.zeros(len(front))
    for j, (column, goal) in enumerate(front.items()):
        if column not in reference or not np.isfinite(reference[column]):
            raise ValueError(f"reference point {dict(reference)} has no finite {column!r}")
        if goal == "minimize":
            if reference[column] <= 0:
                raise ValueError(f"reference of {column!r} is {reference[column]}; expected more than 0")
            rows[:, j] /= reference[column]
            bound[j] = 1.0
        else:
            bound[j] = -reference[column]
    return hypervolume(rows[np.isfinite(rows).all(axis=1)], bound)


def knee(points: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> int | None:
    """Index of the front's point nearest to the ideal one, every column scaled to the front's own range.

    None without any point on the front. Ties go to the first.
    """
    rows = losses(points, front)
    members = np.flatnonzero(_non_dominated(rows))
    if not len(members):
        return None
    values = rows[members]
    span = values.max(axis=0) - values.min(axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(members[np.argmin((scaled**2).sum(axis=1))])
