"""Who goes on at a rung, and that the same reports give the same answers whatever happens between them."""

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from cactus_ray.search.decisions import rung_order
from cactus_ray.search.halving import Decision, Halving, Rules, following, replayed
from cactus_ray.search.objectives import Constraint

GOALS = {"certified": "maximize", "bytes": "minimize"}


def rules(**changes: Any) -> Rules:
    return Rules(**{"goals": GOALS, **changes})


def values(certified: float, size: float) -> dict[str, float]:
    return {"certified": certified, "bytes": size}


def ask(halving: Halving, trial: str, resource: float, certified: float, size: float = 1.0, **more: Any) -> Decision:
    found = halving.report(trial, resource, values(certified, size), **more)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("resource", "rung"),
    [(0.5, None), (1, 1), (2.9, 1), (3, 3), (3 * (1 - 1e-12), 3), (8.9, 3), (9, 9), (81, 81), (math.nan, None)],
)
def test_rungs_are_powers_of_the_reduction(resource: float, rung: float | None) -> None:
    assert rules().rung(resource) == rung
    assert rules(first=2.0, reduction=2.0).rung(resource * 2) == (None if rung is None else pytest.approx(
        2.0 ** math.floor(math.log2(resource * 2) + 1e-9)
    ))  # fmt: skip


def test_the_best_third_goes_on_and_the_first_ones_do() -> None:
    halving = Halving(rules())
    found = [ask(halving, f"t{i}", 1, certified).go_on for i, certified in enumerate([0.1, 0.2, 0.15, 0.3, 0.25, 0.28])]
    assert found == [True, True, False, True, False, True]  # the sixth is the second of six
    assert [d.rank for d in halving.decisions] == [1, 1, 2, 1, 2, 2]
    assert [d.of for d in halving.decisions] == [1, 2, 3, 4, 5, 6]


def test_a_front_that_is_larger_than_its_share_is_cut_by_contribution() -> None:
    halving = Halving(rules(reduction=2.0))
    for i, (certified, size) in enumerate([(0.9, 10.0), (0.1, 1.0), (0.5, 5.0)]):
        ask(halving, f"t{i}", 1, certified, size)
    crowded = ask(halving, "near", 1, 0.51, 5.05)  # on the front, yet hardly more than t2 has
    assert (crowded.front, crowded.go_on) == (0, False)
    apart = ask(halving, "apart", 1, 0.8, 2.0)
    assert (apart.front, apart.rank, apart.go_on) == (0, 1, True)


def test_only_the_highest_rung_reached_is_asked_and_every_other_report_repeats_the_answer() -> None:
    halving = Halving(rules())
    assert halving.report("t", 0.5, values(1, 1)) is None
    first = ask(halving, "t", 1, 0.5)
    assert ask(halving, "t", 2, 0.0) is first
    far = ask(halving, "t", 10, 0.4)
    assert (far.rung, far.of) == (9, 1)
    assert ask(halving, "t", 4, 0.9) is far  # a rung that was passed stays passed
    assert [d.rung for d in halving.decisions] == [1, 9]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, "0.5", True])
def test_what_is_missing_or_not_finite_is_the_worst(bad: Any) -> None:
    halving = Halving(rules())
    ask(halving, "good", 1, 0.0, 1e9)
    broken = halving.report("broken", 1, {"certified": bad, "bytes": 1.0})
    assert broken is not None
    assert (broken.go_on, broken.rank, broken.of, broken.front) == (False, 2, 2, None)
    assert broken.values == {"certified": None, "bytes": 1.0}
    missing = halving.report("missing", 1, {"bytes": 1.0})
    assert missing is not None
    assert (missing.go_on, missing.rank) == (False, 3)
    assert ask(halving, "bad", 1, -5.0, 1e12).rank == 2
    json.dumps(halving.state(), allow_nan=False)


def test_a_rung_of_broken_trials_lets_a_first_one_on_and_not_all() -> None:
    halving = Halving(rules())
    assert [halving.report(f"t{i}", 1, {}).go_on for i in range(6)] == [True] + [False] * 5  # type: ignore[union-attr]
    assert ask(halving, "good", 1, 0.1).rank == 1


def test_feasible_trials_come_first_then_the_least_violation() -> None:
    limits = (Constraint("bytes", max=10.0), Constraint("certified", min=0.2))
    halving = Halving(rules(constraints=limits))
    infeasible = [ask(halving, f"i{i}", 1, certified, size) for i, (certified, size) in enumerate(
        [(0.9, 20.0), (0.9, 15.0), (0.1, 15.0), (0.9, 11.0)]
    )]  # fmt: skip
    assert [d.rank for d in infeasible] == [1, 1, 2, 1]
    assert [d.go_on for d in infeasible] == [True, True, False, True]
    feasible = ask(halving, "f", 1, 0.2, 10.0)
    assert (feasible.rank, feasible.front, feasible.go_on) == (1, 0, True)
    assert ask(halving, "i9", 1, 0.9, 10.5).rank == 2


def test_trials_of_unequal_length_are_compared_at_equal_cost_and_progress() -> None:
    """A long schedule that is still in its ramp is not beaten by a short one that is nearly over."""
    halving = Halving(rules(reduction=2.0))
    for i in range(4):
        ask(halving, f"short{i}", 8, 0.8 - 0.01 * i, progress=0.8)
    long = ask(halving, "long", 8, 0.5, progress=0.2)
    assert (long.front, long.go_on) == (0, True)
    assert ask(halving, "long, worse", 8, 0.4, progress=0.2).front == 1
    assert ask(halving, "short, beaten by the long one", 8, 0.45, progress=0.8).front == 4


def reports(seed: int, trials: int = 30) -> list[tuple[str, float, dict[str, Any], float]]:
    """Reports of trials that run side by side, a few of them broken, in an order that is drawn."""
    draw = random.Random(seed)
    ends = {f"t{i}": draw.choice([9, 12, 27]) for i in range(trials)}
    waiting, found = dict.fromkeys(ends, 1), []
    while waiting:
        trial = draw.choice(sorted(waiting))
        epoch = waiting[trial]
        metrics: dict[str, Any] = values(draw.random(), draw.randrange(5))
        if draw.random() < 0.05:
            metrics["certified"] = math.nan
        found.append((trial, float(epoch), metrics, epoch / ends[trial]))
        waiting[trial] += 1
        if epoch == ends[trial]:
            del waiting[trial]
    return found


@pytest.mark.parametrize("ranking", ["hypervolume", "crowding", "epsilon_net"])
def test_resuming_anywhere_gives_the_same_decisions_and_every_one_replays(ranking: str) -> None:
    asked = reports(0)
    through = Halving(rules(ranking=ranking))
    for report in asked:
        through.report(*report)
    assert 0 < sum(not d.go_on for d in through.decisions) < len(through.decisions)
    for cut in (1, 75, 200):
        first = Halving(rules(ranking=ranking))
        for report in asked[:cut]:
            first.report(*report)
        second = Halving(rules(ranking=ranking))
        second.take_up(map(Decision.of_event, json.loads(json.dumps(first.state()))))
        for report in asked[max(cut - 20, 0) :]:  # some are delivered again
            second.report(*report)
        assert sorted(map(str, second.decisions)) == sorted(map(str, through.decisions))
    again = replayed(rules(ranking=ranking), reversed(through.decisions))
    assert sorted(map(str, again)) == sorted(map(str, through.decisions))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"goals": {}}, "at least one"), ({"goals": {"a": "up"}}, "'up'"), ({"reduction": 1.0}, "1.0"),
        ({"reduction": math.nan}, "nan"), ({"first": 0.0}, "0.0"), ({"ranking": "best"}, "'best'"),
        ({"constraints": (Constraint("a"),)}, "constraint on a: got .*; expected min <= max, or one"),
        ({"constraints": (Constraint("a", min=2.0, max=1.0),)}, "constraint on a"),
        ({"constraints": (Constraint("a", min=math.nan, max=1.0),)}, "constraint on a"),
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules(**bad)


ALL = {f"t{i}" for i in range(30)} | {"best", "infeasible", "broken"}


def test_whoever_waits_goes_on_once_among_the_best_share() -> None:
    halving = Halving(rules(promote=True))
    found = [ask(halving, f"t{i}", 1, certified).go_on for i, certified in enumerate([0.3, 0.1])]
    assert found == [False, False]  # a third of two is nobody
    assert halving.promote(ALL) is None
    assert not ask(halving, "t2", 1, 0.2).go_on
    assert halving.promote(ALL - {"t0"}) is None  # only those that do wait are asked for
    first = halving.promote(ALL)
    assert first is not None
    assert (first.trial, first.rank, first.of, first.go_on, first.promoted) == ("t0", 1, 3, True, True)
    assert halving.standing("t0") is first
    assert halving.promote(ALL) is None
    assert [ask(halving, f"t{i}", 1, 0.05).go_on for i in (3, 4, 5)] == [False] * 3
    assert ask(halving, "best", 1, 0.9).go_on  # the first of seven need not wait


def test_at_the_end_a_few_of_every_rung_go_on_once_nobody_can_come_there_any_more() -> None:
    halving = Halving(rules(promote=True))
    for i, certified in enumerate([0.3, 0.1]):
        ask(halving, f"t{i}", 1, certified)
    assert halving.promote(ALL, closing=True, busy=["t2"]) is None  # the third may be better than both
    for i, certified in enumerate([0.2, 0.4, 0.05], 2):
        ask(halving, f"t{i}", 1, certified)
    assert halving.promote(ALL) is None  # t3 was the best of four and need not wait
    for trial, rank in (("t0", 2), ("t2", 3)):  # three of five, out of whom one would be chosen
        found = halving.promote(ALL, closing=True, busy=["t3"])
        assert found is not None
        assert (found.trial, found.rank) == (trial, rank)
    assert halving.promote(ALL, closing=True) is None
    ask(halving, "t3", 3, 0.4)
    ask(halving, "t0", 3, 0.5)
    assert halving.promote(ALL, closing=True, busy=["t2"]) is None
    ask(halving, "t2", 3, 0.6)
    assert [d.trial for d in iter(lambda: halving.promote(ALL, closing=True), None)] == ["t0", "t3"]
    assert replayed(halving.rules, halving.decisions) == sorted(halving.decisions, key=rung_order)


def test_the_rest_goes_on_best_first_where_the_rules_say_so() -> None:
    halving = Halving(rules(promote=True, rest=True, reduction=2.0))
    for i in range(6):
        ask(halving, f"t{i}", 1, 0.9 - 0.1 * i)
    assert [d.trial for d in iter(lambda: halving.promote(ALL), None)] == ["t0", "t1", "t2"]
    found = [d.trial for d in iter(lambda: halving.promote(ALL, closing=True, busy=["t0"]), None)]
    assert found == ["t3", "t4", "t5"]


def test_a_free_place_goes_to_one_that_waits_then_to_a_new_one_then_to_the_end() -> None:
    halving = Halving(rules(promote=True))
    for i, certified in enumerate([0.3, 0.1, 0.2]):
        ask(halving, f"t{i}", 1, certified)
    new = iter(["t3", None, None, None])

    def who(busy: list[str]) -> str | None:
        found = following(halving, ALL, lambda: next(new), busy)
        return found.trial if isinstance(found, Decision) else found

    assert [who([]), who([]), who(["t3"]), who([]), who([])] == ["t0", "t3", None, "t2", "t1"]
    assert following(halving, set(), lambda: None, []) is None


def test_the_highest_rung_promotes_first_and_what_was_not_compared_never_goes_on() -> None:
    halving = Halving(rules(promote=True, rest=True, reduction=2.0, constraints=(Constraint("certified", min=0.05),)))
    for i, certified in enumerate([0.4, 0.3, 0.2, 0.1]):
        ask(halving, f"t{i}", 1, certified)
    for trial, certified in (("t2", 0.2), ("t3", 0.1)):
        ask(halving, trial, 2, certified)
    order = [decision.trial for decision in iter(lambda: halving.promote(ALL), None)]
    assert order == ["t2", "t0", "t1"]
    ask(halving, "infeasible", 1, 0.01)
    assert halving.report("broken", 1, {}) is not None
    left = [decision.trial for decision in iter(lambda: halving.promote(ALL, closing=True), None)]
    assert left == ["t3"]


def test_promotions_are_rebuilt_from_records_and_replayed() -> None:
    halving, draws = Halving(rules(promote=True)), random.Random(0)
    for i in range(20):
        ask(halving, f"t{i}", 1, draws.random(), draws.random())
        halving.promote(ALL)
    plain = json.loads(json.dumps(halving.state()))
    again = Halving(rules(promote=True))
    again.take_up(map(Decision.of_event, random.Random(1).sample(plain, len(plain))))
    assert [again.standing(f"t{i}") for i in range(20)] == [halving.standing(f"t{i}") for i in range(20)]
    assert sum(d.promoted for d in again.decisions) > 2
    assert ask(again, "t20", 1, 0.5, 0.5) == ask(halving, "t20", 1, 0.5, 0.5)
    assert again.promote(ALL) == halving.promote(ALL)
    assert replayed(rules(promote=True), halving.decisions) == halving.decisions
    wrong = [replace(d, go_on=True, promoted=True) for d in halving.decisions if halving.standing(d.trial) is d]
    lost = [d for d in wrong if d not in halving.decisions and d.rank == d.of > 3]
    found = replayed(rules(promote=True), [*halving.decisions, *lost])
    assert lost
    assert found == halving.decisions  # one that was promoted without a reason is not promoted again
