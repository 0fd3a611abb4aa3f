"""Fronts that grow point by point are those of the definition; contributions are volumes."""

import numpy as np
import pytest

from cactus_ray.search.pareto import hypervolume
from cactus_ray.search.ranking import RANKINGS, REFERENCE, Fronts, within_front


def peeled(rows: np.ndarray) -> list[int]:
    """The front of every row by the definition: take the non-dominated ones away, again and again."""
    no_worse = (rows[:, None] <= rows[None]).all(axis=2)
    dominates = no_worse & ~no_worse.T
    found, left, front = np.zeros(len(rows), dtype=int), np.ones(len(rows), dtype=bool), 0
    while left.any():
        keep = left & ~dominates[left].any(axis=0)
        found[keep] = front
        left, front = left & ~keep, front + 1
    return found.tolist()


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [4, 1000])
def test_fronts_that_grow_are_those_of_non_dominated_sorting(columns: int, steps: int) -> None:
    generator = np.random.default_rng(columns)
    for _ in range(3):
        rows = generator.integers(steps, size=(40, columns)) / steps  # with 4 steps, many are equal
        fronts = Fronts(columns)
        for number, row in enumerate(rows):
            place = fronts.add(row)
            expected = peeled(rows[: number + 1])
            assert place == expected[-1]
            assert fronts.ahead_of(place) == sum(front < place for front in expected)
        assert sorted(number for members in fronts.fronts for number in members) == list(range(len(rows)))
        assert all(peeled(rows)[i] == front for front, members in enumerate(fronts.fronts) for i in members)


@pytest.mark.parametrize(("columns", "points"), [(2, 40), (3, 12), (4, 8)])
def test_a_contribution_is_the_volume_that_is_lost_without_the_point(columns: int, points: int) -> None:
    generator = np.random.default_rng(0)
    rows = generator.random((200, columns))
    fronts = Fronts(columns)
    for row in rows:
        fronts.add(row)
    front = rows[fronts.fronts[1]][:points]
    front = (front - front.min(axis=0)) / np.ptp(front, axis=0)
    whole = hypervolume(front, [REFERENCE] * columns)
    lost = [whole - hypervolume(np.delete(front, i, axis=0), [REFERENCE] * columns) for i in range(len(front))]
    assert RANKINGS["hypervolume"](front) == pytest.approx(lost)


def test_a_large_front_is_ranked_by_shares_of_its_volume() -> None:
    generator = np.random.default_rng(0)
    rows = generator.random((100, 3))
    rows /= rows.sum(axis=1, keepdims=True)  # a plane: none dominates another
    worth = RANKINGS["hypervolume"](rows)
    whole = hypervolume(rows, [REFERENCE] * 3) / REFERENCE**3
    assert worth.sum() / 1024 == pytest.approx(whole, abs=0.01)
    assert (worth > 0).all()
    assert np.array_equal(worth, RANKINGS["hypervolume"](rows))


def test_crowding_keeps_the_ends_and_an_epsilon_net_spreads() -> None:
    rows = np.array([[0.0, 1.0], [0.1, 0.9], [0.15, 0.85], [0.5, 0.5], [1.0, 0.0]])
    assert within_front(rows, "crowding").tolist() == [0, 4, 3, 2, 1]
    assert within_front(rows, "epsilon_net").tolist() == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("ranking", sorted(RANKINGS))
def test_equal_points_count_once_and_the_first_of_them_stands_for_all(ranking: str) -> None:
    rows = np.array([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    assert within_front(rows, ranking).tolist()[-2:] == [2, 4]
    assert within_front(rows[:1], ranking).tolist() == [0]
    assert within_front(np.zeros((3, 2)), ranking).tolist() == [0, 1, 2]
