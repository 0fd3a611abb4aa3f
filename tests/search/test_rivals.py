"""Which points dear verification may pass over, and that the front stays that of full verification."""

import random
from typing import Any

import pytest

from cactus_ray.search.pareto import non_dominated
from cactus_ray.search.rivals import Rivals, bettered_by

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}


def point(certified: int, unknown: int, size: int) -> dict[str, Any]:
    return {
        "samples": 100,
        "n_certified": certified,
        "n_unknown": unknown,
        "certified_accuracy": certified / 100,
        "bytes": size,
    }


@pytest.mark.parametrize(
    ("rival", "expected"),
    [
        (point(85, 0, 900), True),  # beats even 80 + 4
        (point(84, 0, 1000), False),  # no better than what may be reached
        (point(84, 0, 999), True),
        (point(99, 0, 1001), False),  # larger
        (point(82, 0, 900), False),  # may be passed
        (point(82, 10, 900), False),  # what the rival may yet reach does not count
    ],
)
def test_a_point_is_spared_only_where_its_best_outcome_is_beaten_by_a_rivals_worst(
    rival: dict[str, Any], expected: bool
) -> None:
    mine = point(80, 4, 1000)
    found = bettered_by(mine, [point(10, 0, 5000), rival], FRONT)
    assert found is (rival if expected else None)
    assert mine == point(80, 4, 1000)


def test_without_rivals_or_figures_nothing_is_ruled_out() -> None:
    assert bettered_by(point(0, 1, 10**9), [], FRONT) is None
    assert bettered_by({**point(0, 1, 10**9), "bytes": None}, [point(99, 0, 1)], FRONT) is None
    assert bettered_by(point(0, 1, 10**9), [{**point(99, 0, 1), "bytes": float("nan")}], FRONT) is None


COLUMNS = {
    "certified_accuracy": "maximize", "bytes": "minimize", "standard_accuracy": "maximize", "n_falsified": "minimize",
    "n_unknown": "minimize", "n_certified": "maximize", "verify_seconds": "minimize",
}  # fmt: skip
GOAL = {"maximize": "minimize", "minimize": "maximize"}


def decided(cheap: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A point after dear verification, whatever it finds."""
    left = cheap["n_unknown"]
    sure = draw.randint(0, left)
    wrong = draw.randint(0, left - sure)
    certified = cheap["n_certified"] + sure
    return {
        **cheap, "n_certified": certified, "certified_accuracy": certified / 10, "n_unknown": left - sure - wrong,
        "n_falsified": cheap["n_falsified"] + wrong, "verify_seconds": cheap["verify_seconds"] + draw.randint(0, 2),
    }  # fmt: skip


def cheap_point(name: int, draw: random.Random) -> dict[str, Any]:
    certified = draw.randint(0, 10)
    falsified = draw.randint(0, 10 - certified)
    return {
        "name": name, "samples": 10, "n_certified": certified, "n_falsified": falsified,
        "n_unknown": 10 - certified - falsified, "certified_accuracy": certified / 10, "bytes": draw.randint(1, 4),
        "standard_accuracy": draw.choice([0.8, 0.9]), "verify_seconds": draw.randint(0, 2),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(150))
def test_the_front_is_that_of_full_verification(seed: int) -> None:
    """Trials come one after the other; whatever dear verification finds, what is spared was never on the front."""
    draw = random.Random(seed)
    front = {c: g if draw.random() < 0.8 else GOAL[g] for c, g in COLUMNS.items() if draw.random() < 0.5}
    front = front or {"certified_accuracy": "maximize"}
    thrifty: list[dict[str, Any]] = []
    rivals = Rivals(front, [])
    full: list[dict[str, Any]] = []
    for trial in range(6):
        cheap = [cheap_point(10 * trial + level, draw) for level in range(3)]
        whole = [decided(p, draw) for p in cheap]
        found = []
        for p, w in zip(cheap, whole, strict=True):
            beaten = rivals.of(p, [other for other in cheap if other is not p]) is not None
            found.append(p if beaten else w)
        rivals.add(found)
        thrifty += found
        full += whole

    def names(points: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {p["name"]: p for p, on in zip(points, non_dominated(points, front), strict=True) if on}

    assert names(thrifty) == names(full)
