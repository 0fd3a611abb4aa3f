"""With whom a trial was compared at its last rung, and who stood better there. Pure: from recorded decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cactus_ray.search.halving import Decision, Halving
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.rungs import proxy_goals, rules_of
from cactus_ray.search.space import Space

SHOWN_BETTER = 5


def last_rung(space: Space, records: Records, trial: TrialRecord) -> dict[str, Any] | None:
    """The comparison at the highest rung that a trial came to, as plain data; None for one that came to none.

    ``goals``, ``values`` and ``progress`` (the share of its schedule behind it, a column to be minimised) are what was
    compared, by fronts and within a front by ``ranking``; ``front`` (from 0, None where it was not compared for lack of
    a value), ``rank`` and ``of`` what came of it. ``better``: the first of those ahead of it, the ones that dominate it
    before the others. ``now``: rank and of among all that came to the rung by now, where trials wait and the comparison
    goes on; ``better`` is then by now, and otherwise by the reports that had come when it was decided.
    """
    if not trial.rungs:
        return None
    rules = rules_of(space.search.scheduler, proxy_goals(space.levels))
    last = max(trial.rungs, key=lambda decision: (decision.rung, decision.promoted))
    seen = _reports(records, last.rung)
    own = next((decision for decision in seen if decision.trial == trial.id), last)
    if not rules.promote:
        seen = [decision for decision in seen if decision.of <= own.of]
    halving = Halving(rules)
    halving.take_up(seen)
    by_name = {decision.trial: decision for decision in seen}
    order = halving.ranked(last.rung)
    place = next((i for i, (name, _) in enumerate(order) if name == trial.id), len(order))
    ahead = [(i, by_name[name], front) for i, (name, front) in enumerate(order[:place], 1)]
    ahead.sort(key=lambda row: not _dominates(row[1], own, rules.goals))  # stable: by rank within each
    found: dict[str, Any] = {
        "rung": last.rung, "ranking": rules.ranking, "goals": dict(rules.goals),
        "values": dict(own.values), "progress": own.progress,
        "front": own.front, "rank": own.rank, "of": own.of, "went_on": last.go_on, "promoted": last.promoted,
        "better": [
            {
                "trial": decision.trial, "rank": rank, "front": front, "values": dict(decision.values),
                "progress": decision.progress, "dominates": _dominates(decision, own, rules.goals),
            }
            for rank, decision, front in ahead[:SHOWN_BETTER]
        ],
    }  # fmt: skip
    if rules.promote and place < len(order):
        found["now"] = {"rank": place + 1, "front": order[place][1], "of": len(seen)}
    return found


def _reports(records: Records, rung: float) -> list[Decision]:
    """What was decided on reports to a rung, in their order; promotions repeat them."""
    decisions = (decision for trial in records.trials.values() for decision in trial.rungs)
    return sorted((d for d in decisions if d.rung == rung and not d.promoted), key=lambda d: d.of)


def _dominates(one: Decision, other: Decision, goals: Mapping[str, str]) -> bool:
    """Whether ``one`` is no worse in every goal, and no nearer to the end of its schedule, and better somewhere."""
    pairs = [(one.progress, other.progress)]
    for name, goal in goals.items():
        mine, theirs = one.values.get(name), other.values.get(name)
        if mine is None or theirs is None:
            return False
        pairs.append((-mine, -theirs) if goal == "maximize" else (mine, theirs))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
