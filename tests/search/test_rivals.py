"""Which points dear verification may pass over, and that the front stays that of full verification."""

import random
from typing import Any

import pytest

from cactus_ray.search.objectives import Constraint, feasible, trial_metrics
from cactus_ray.search.pareto import non_dominated
from cactus_ray.search.rivals import Rivals, bettered_by, standing

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


def cheap_point(name: str, draw: random.Random) -> dict[str, Any]:
    certified = draw.randint(0, 10)
    falsified = draw.randint(0, 10 - certified)
    return {
        "name": name, "samples": 10, "n_certified": certified, "n_falsified": falsified,
        "n_unknown": 10 - certified - falsified, "certified_accuracy": certified / 10, "bytes": draw.randint(1, 4),
        "standard_accuracy": draw.choice([0.8, 0.9]), "verify_seconds": draw.randint(0, 2), "macs": 1,
    }  # fmt: skip


CONSTRAINED = (
    "standard_accuracy@a", "certified_accuracy@b", "mean_certified_accuracy", "bytes@c", "train_seconds",
)  # fmt: skip


SIZE = ({"bytes": "minimize"}, {"bytes": 5.0})


def limits(draw: random.Random) -> list[Constraint]:
    """None, one or two, at values that trials can have exactly."""
    found = []
    for metric in draw.sample(CONSTRAINED, draw.randint(0, 2)):
        limit = float(draw.randint(1, 4)) if metric in ("bytes@c", "train_seconds") else draw.randint(0, 9) / 10
        found.append(Constraint(metric, **{draw.choice(["min", "max"]): limit}))
    return found


@pytest.mark.parametrize("seed", range(300))
def test_both_fronts_are_those_of_full_verification(seed: int) -> None:
    """Trials come one after the other; whatever dear verification finds, what is spared was never on the front of all
    trials, nor on that of those that keep the constraints, and none is taken for one that breaks them."""
    draw = random.Random(seed)
    front = {c: g if draw.random() < 0.8 else GOAL[g] for c, g in COLUMNS.items() if draw.random() < 0.5}
    front = front or {"certified_accuracy": "maximize"}
    constraints = limits(draw)
    rivals = Rivals(front, constraints)
    runs: dict[str, list[tuple[list[dict[str, Any]], bool]]] = {"thrifty": [], "full": []}
    for trial in range(6):
        seconds = float(draw.randint(1, 4))
        cheap = [cheap_point(f"{trial}{level}", draw) | {"level": level, "train_seconds": seconds} for level in "abc"]
        whole = [decided(p, draw) for p in cheap]
        now = list(cheap)  # level by level, as chunks come in
        for place in draw.sample(range(3), 3):
            if rivals.of(now[place], now) is None:
                now[place] = whole[place]
        rivals.add(now, kept := trial_metrics(now, seconds, *SIZE))
        runs["thrifty"].append((now, met(kept, constraints)))
        runs["full"].append((whole, met(trial_metrics(whole, seconds, *SIZE), constraints)))
    assert [kept for _, kept in runs["thrifty"]] == [kept for _, kept in runs["full"]]
    for within in (False, True):
        thrifty, full = (
            leading([p for points, kept in run if kept or not within for p in points], front) for run in runs.values()
        )
        assert thrifty == full


def met(metrics: dict[str, float], constraints: list[Constraint]) -> bool:
    return all(violation <= 0 for violation in feasible(metrics, constraints).values())


def leading(points: list[dict[str, Any]], front: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {p["name"]: p for p, on in zip(points, non_dominated(points, front), strict=True) if on}


# --- constraints


def curve(dense: dict[str, Any], small: dict[str, Any]) -> list[dict[str, Any]]:
    rest = {"standard_accuracy": 0.9, "train_seconds": 0.1}
    return [{**dense, **rest, "level": "dense"}, {**small, **rest, "level": "int8"}]


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (Constraint("certified_accuracy@int8", min=0.5), True),
        (Constraint("certified_accuracy@int8", min=0.54), None),
        (Constraint("certified_accuracy@int8", min=0.55), False),
        (Constraint("certified_accuracy@int8", max=0.52), None),
        (Constraint("certified_accuracy@int8", max=0.54), True),
        (Constraint("certified_accuracy@int8", max=0.49), False),
        (Constraint("mean_certified_accuracy", min=0.65), True),
        (Constraint("mean_certified_accuracy", min=0.69), None),
        (Constraint("mean_certified_accuracy", min=0.7), False),
        (Constraint("standard_accuracy@dense", min=0.9), True),
        (Constraint("standard_accuracy@dense", min=0.95), False),
        (Constraint("train_seconds", max=0.1), True),
        (Constraint("hypervolume", min=0.0), None),
    ],
)
def test_a_constraint_is_kept_broken_or_open(constraint: Constraint, expected: bool | None) -> None:
    assert standing(constraint, curve(point(80, 4, 1000), point(50, 4, 250))) is expected


def test_rivals_that_break_a_constraint_spare_nobody_who_may_keep_it() -> None:
    limit = Constraint("standard_accuracy@int8", min=0.9)
    rivals = Rivals(FRONT, [limit])
    best = curve(point(99, 0, 900), point(99, 0, 90))
    rivals.add(best, {"standard_accuracy@int8": 0.5})
    mine = curve(point(80, 4, 1000), point(70, 4, 100))
    assert [rivals.of(p, mine) for p in mine] == [None, None]
    lost = [{**p, "standard_accuracy": 0.8} for p in mine]  # this one breaks it, too
    assert [rivals.of(p, lost) for p in lost] == [best[1], best[1]]
    rivals.add(kept := curve(point(98, 0, 950), point(60, 0, 100)), {"standard_accuracy@int8": 0.9})
    assert [rivals.of(p, mine) for p in mine] == [kept[0], None]
    siblings = curve(point(60, 4, 1000), point(70, 4, 100))
    assert rivals.of(siblings[0], siblings) is not None


def test_what_may_decide_a_constraint_is_not_spared() -> None:
    rivals = Rivals(FRONT, [Constraint("mean_certified_accuracy", min=0.69)])
    rivals.add(curve(point(99, 0, 900), point(99, 0, 90)), {"mean_certified_accuracy": 0.99})
    mine = curve(point(80, 4, 1000), point(50, 4, 250))
    assert [rivals.of(p, mine) for p in mine] == [None, None]
    settled = curve(point(88, 4, 1000), point(50, 4, 250))
    assert None not in [rivals.of(p, settled) for p in settled]
