"""Fronts that grow point by point are those of the definition; contributions are volumes, whatever was known before."""

import numpy as np
import pytest

from cactus_ray.search.pareto import hypervolume
from cactus_ray.search.ranking import _SAMPLES, RANKINGS, REFERENCE, Fronts, Order, _sequence


def contributions(front: np.ndarray) -> np.ndarray:
    return RANKINGS["hypervolume"]()(np.arange(len(front)), front)


def order(rows: np.ndarray, ranking: str) -> list[int]:
    """The order of rows of which none dominates another."""
    fronts = Fronts(rows.shape[1])
    for row in rows:
        assert fronts.add(row) == 0
    return best(fronts, 0, ranking)


def best(fronts: Fronts, front: int, ranking: str) -> list[int]:
    found = Order(ranking)
    found.update(fronts, front)
    return found.best.tolist()


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
            assert fronts.place[: number + 1].tolist() == expected
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
    assert contributions(front) == pytest.approx(lost)


def test_a_large_front_is_ranked_by_shares_of_its_volume() -> None:
    generator = np.random.default_rng(0)
    rows = generator.random((100, 3))
    rows /= rows.sum(axis=1, keepdims=True)  # a plane: none dominates another
    rows = (rows - rows.min(axis=0)) / np.ptp(rows, axis=0)
    worth = contributions(rows)
    whole = hypervolume(rows, [REFERENCE] * 3) / REFERENCE**3
    assert worth.sum() / 1024 == pytest.approx(whole, abs=0.01)
    assert (worth > 0).all()
    assert np.array_equal(worth, contributions(rows))


def test_crowding_keeps_the_ends_and_an_epsilon_net_spreads() -> None:
    rows = np.array([[0.0, 1.0], [0.1, 0.9], [0.15, 0.85], [0.5, 0.5], [1.0, 0.0]])
    assert order(rows, "crowding") == [0, 4, 3, 2, 1]
    assert order(rows, "epsilon_net") == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("ranking", sorted(RANKINGS))
def test_equal_points_count_once_and_the_first_of_them_stands_for_all(ranking: str) -> None:
    rows = np.array([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    assert order(rows, ranking)[-2:] == [2, 4]
    assert order(rows[:1], ranking) == [0]
    assert order(np.zeros((3, 2)), ranking) == [0, 1, 2]
    assert order(np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, -0.0], [1.0, 0.0]]), ranking)[-2:] == [1, 3]


def grown(columns: int, steps: int, seed: int, count: int = 120) -> np.ndarray:
    """Points that are hardly ever dominated; every now and then one that lies outside of all before, and many equal."""
    generator = np.random.default_rng(seed)
    rows = generator.random((count, columns))
    rows /= rows.sum(axis=1, keepdims=True) / generator.choice([1.0, 1.0, 1.02, 0.9], size=(count, 1))
    rows[::17] += generator.normal(size=rows[::17].shape) * 0.3
    rows = np.round(rows * steps) / steps
    again = generator.random(count) < 0.1
    rows[again] = rows[generator.integers(count, size=int(again.sum()))]
    return rows


@pytest.mark.parametrize("ranking", sorted(RANKINGS))
@pytest.mark.parametrize(("columns", "steps"), [(2, 20), (3, 15), (3, 1e6), (5, 10), (5, 1e6)])
def test_an_order_that_is_kept_up_to_date_is_that_worked_out_anew(ranking: str, columns: int, steps: float) -> None:
    for seed in range(2):
        fronts, orders = Fronts(columns), [Order(ranking) for _ in range(4)]
        for number, row in enumerate(grown(columns, int(steps), seed)):
            place = fronts.add(row)
            for front, kept in enumerate(orders[: len(fronts.fronts)]):
                if front == place or number % (front + 2) == 0:  # some are not asked for a while
                    kept.update(fronts, front)
                    assert kept.best.tolist() == best(fronts, front, ranking)
                    assert [kept.rank(n) for n in kept.best] == list(range(1, len(kept.best) + 1))
        assert len(fronts.fronts[0]) > 5


@pytest.mark.parametrize("columns", [3, 4, 6])
def test_shares_are_of_the_samples_that_are_dominated_whoever_came_and_went_before(columns: int) -> None:
    generator, volumes = np.random.default_rng(columns), RANKINGS["hypervolume"]()
    rows = generator.random((90, columns))
    for _ in range(12):
        rows = rows * generator.choice([1.0, 1.0, 1.5], size=columns)  # the range changes, or not
        numbers = np.sort(generator.choice(90, size=int(generator.integers(40, 90)), replace=False))
        worth = volumes(numbers, rows[numbers])
        scaled = (rows[numbers] - rows[numbers].min(axis=0)) / np.ptp(rows[numbers], axis=0)
        dominated = (scaled[:, None] <= REFERENCE * _sequence(columns)[None]).all(axis=2)
        assert dominated.shape == (len(numbers), _SAMPLES)
        assert worth == pytest.approx((dominated / np.maximum(dominated.sum(axis=0), 1)).sum(axis=1))
        assert np.array_equal(worth, RANKINGS["hypervolume"]()(numbers, rows[numbers]))
