"""Fronts and volumes against definitions spelled out, brute force and hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.search.pareto import Front, hypervolume, knee, non_dominated, relative_hypervolume

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}
grid = st.integers(0, 4).map(float)


def point(certified: float | None, size: float | None) -> dict[str, float | None]:
    return {"certified_accuracy": certified, "bytes": size}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(grid, grid, grid), max_size=12))
def test_the_front_is_what_no_other_point_beats(rows: list[tuple[float, float, float]]) -> None:
    front = {"a": "maximize", "b": "minimize", "c": "maximize"}
    points = [dict(zip("abc", row, strict=True)) for row in rows]

    def beats(p: tuple[float, float, float], q: tuple[float, float, float]) -> bool:
        return p[0] >= q[0] and p[1] <= q[1] and p[2] >= q[2] and p != q

    assert non_dominated(points, front) == [not any(beats(p, q) for p in rows) for q in rows]


odd = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf, None])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(odd, odd, odd), max_size=5), max_size=8))
def test_a_front_that_is_kept_is_the_front_of_all(trials: list[list[tuple[float | None, ...]]]) -> None:
    """With equal points, and with values that are missing or not finite; what leaves it never comes back."""
    goals = {"a": "maximize", "b": "minimize", "c": "maximize"}
    kept, points, off = Front(goals), [], []
    for rows in trials:
        new = [dict(zip("abc", row, strict=True)) for row in rows]
        points += new
        off += kept.add(new)
        expected = [p for p, on in zip(points, non_dominated(points, goals), strict=True) if on]
        assert list(map(id, kept.points)) == list(map(id, expected))
        assert sorted(map(id, [*off, *kept.points])) == sorted(map(id, points))
    assert list(map(id, Front(goals, points).points)) == list(map(id, kept.points))


def test_points_without_a_finite_value_are_out_and_beat_nothing() -> None:
    points = [point(math.nan, 1.0), point(math.inf, 1.0), point(0.9, None), {"bytes": 1.0}, point(0.5, 100.0)]
    assert non_dominated(points, FRONT) == [False, False, False, False, True]
    assert non_dominated([], FRONT) == []


def test_an_unknown_goal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'max'.*maximize"):
        non_dominated([point(1.0, 1.0)], {"bytes": "max"})


@pytest.mark.parametrize(
    ("values", "reference", "volume"),
    [
        ([[1.0]], [3.0], 2.0),
        ([[1.0, 2.0], [2.0, 1.0]], [3.0, 3.0], 3.0),
        ([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0]], [3.0, 3.0], 3.0),
        ([[0.0, 0.0, 0.0]], [1.0, 2.0, 3.0], 6.0),
        ([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [2.0, 2.0, 2.0], 4.0),
        ([[3.0, 0.0], [0.0, 3.0], [5.0, -1.0]], [3.0, 3.0], 0.0),
        ([], [1.0, 1.0], 0.0),
    ],
)
def test_hypervolume_by_hand(values: list[list[float]], reference: list[float], volume: float) -> None:
    assert hypervolume(np.array(values), reference) == pytest.approx(volume, abs=1e-12)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_hypervolume_agrees_with_sampling(columns: int) -> None:
    random = np.random.default_rng(columns)
    values, samples = random.random((12, columns)), random.random((100_000, columns))
    covered = (values[None] <= samples[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(values, np.ones(columns)) == pytest.approx(covered, abs=0.006)


def test_hypervolume_wants_finite_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        hypervolume(np.array([[math.nan, 0.0]]), [1.0, 1.0])


def test_relative_hypervolume_is_accuracy_times_the_share_of_bytes_saved() -> None:
    reference = {"certified_accuracy": 0.0, "bytes": 1000.0}
    points = [point(0.8, 500.0), point(0.6, 100.0), point(math.nan, 1.0), point(0.5, 600.0), point(1.0, 1000.0)]
    assert relative_hypervolume(points, FRONT, reference) == pytest.approx(0.8 * 0.5 + 0.6 * 0.4)
    assert relative_hypervolume([], FRONT, reference) == 0.0
    with pytest.raises(ValueError, match="'bytes'"):
        relative_hypervolume(points, FRONT, {"certified_accuracy": 0.0})
    with pytest.raises(ValueError, match="more than 0"):
        relative_hypervolume(points, FRONT, {"certified_accuracy": 0.0, "bytes": 0.0})


def test_the_knee_is_the_balanced_point_of_the_front() -> None:
    points = [point(0.5, 900.0), point(0.9, 1000.0), point(0.85, 200.0), point(0.3, 100.0)]
    assert knee(points, FRONT) == 2
    assert knee([point(math.nan, 1.0)], FRONT) is None
    assert knee(points[:1], FRONT) == 0
