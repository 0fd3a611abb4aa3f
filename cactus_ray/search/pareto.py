"""Which points are on the front, how much they cover, and which one is the knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GOALS = ("maximize", "minimize")
Array = npt.NDArray[np.float64]


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
    keep: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    valid = rows[keep]
    # NaN rows are out, so that every comparison below is between numbers.
    worse = [bool(((valid <= row).all(axis=1) & (valid < row).any(axis=1)).any()) for row in valid]
    keep[keep] = ~np.array(worse, dtype=bool)
    return keep


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
