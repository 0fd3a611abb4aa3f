"""Which points are worth dear verification, and how verdicts are counted."""

from typing import Any

import pytest

from cactus_ray.search.chunks import counts, worth

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
        (point(85, 0, 900), False),  # beats even 80 + 4
        (point(84, 0, 1000), True),  # no better than what may be reached
        (point(84, 0, 999), False),
        (point(99, 0, 1001), True),  # larger
        (point(82, 0, 900), True),  # may be passed
    ],
)
def test_dear_work_is_worth_it_unless_the_best_outcome_is_beaten(rival: dict[str, Any], expected: bool) -> None:
    mine = point(80, 4, 1000)
    assert worth(mine, [point(10, 0, 5000), rival], FRONT) is expected
    assert mine == point(80, 4, 1000)


def test_without_rivals_or_figures_nothing_is_ruled_out() -> None:
    assert worth(point(0, 1, 10**9), [], FRONT)
    assert worth({**point(0, 1, 10**9), "bytes": None}, [point(99, 0, 1)], FRONT)
    assert worth(point(0, 1, 10**9), [{**point(99, 0, 1), "bytes": float("nan")}], FRONT)


def test_counts_add_up() -> None:
    rows = [[i, 0, v, v != "FALSIFIED", None, "x", 0.0] for i, v in enumerate(["CERTIFIED", "UNKNOWN", "FALSIFIED"])]
    assert counts(rows) == {
        "samples": 3, "standard_accuracy": 2 / 3, "n_certified": 1, "n_falsified": 1, "n_unknown": 1,
        "certified_accuracy": 1 / 3,
    }  # fmt: skip
