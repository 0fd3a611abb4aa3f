"""Multi-objective asynchronous successive halving: which trial goes on, decided from reports alone.

The stopping variant of ASHA (Li et al. 2020, arXiv 1810.05934), with non-dominated sorting in the place of one metric
(Schmucker et al. 2021, arXiv 2106.12639). Rungs lie at ``first * reduction ** k`` of a resource. A trial that reaches a
rung goes on if it is among the best ``1 / reduction`` of all that the rung has seen so far, itself included; as long as
that share is less than one trial, whoever comes goes on. Nobody waits for others, and a decision is never taken back:
those that a later and better trial would have stopped go on to the next rung.

With ``Rules.promote`` trials wait instead of being stopped (the promoting variant of the same paper), the first at a
rung, too, until ``Halving.promote`` finds them among the best share of all that have come since. ``following`` is the
rule by which a place that is free is given to one that waits or to a new one.

Pure: no clock, no Ray, no randomness. The same reports in the same order give the same decisions.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cactus_ray.search.decisions import Decision, Rules, finite_or_none, rung_order
from cactus_ray.search.ranking import Fronts, Order

__all__ = ["Decision", "Halving", "Rules", "following", "replayed"]

New = TypeVar("New")


@dataclass(slots=True)
class _Rung:
    """All reports to one rung: feasible ones, infeasible ones (by violation), and those with a value missing.

    ``numbers``: trial -> its number among the feasible; ``held``: by number, whether it stands here and does not go
    on; ``orders``: of fronts.
    """

    fronts: Fronts
    trials: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    violations: list[float] = field(default_factory=list)
    broken: int = 0
    held: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(16, dtype=np.bool_))
    orders: dict[int, Order] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.fronts.count + len(self.violations) + self.broken

    def hold(self, trial: str, held: bool) -> None:
        """Note whether a trial stands here and does not go on."""
        number = self.numbers.get(trial)
        if number is not None:
            self.held[number] = held

    def order(self, front: int, ranking: str) -> Order:
        """The order of a front's members as they are now."""
        found = self.orders.get(front) or self.orders.setdefault(front, Order(ranking))
        found.update(self.fronts, front)
        return found

    def first(self, kept: int, ranking: str, waiting: Collection[str]) -> tuple[int, int] | None:
        """The number and the rank (from 1) of the first of the best so many that is held here and waits."""
        ahead = 0
        for front, members in enumerate(self.fronts.fronts):
            if ahead >= kept:
                break
            if self.held[members].any():
                best = self.order(front, ranking).best[: kept - ahead]
                for place in np.flatnonzero(self.held[best]):
                    if self.trials[best[place]] in waiting:
                        return int(best[place]), ahead + int(place) + 1
            ahead += len(members)
        return None


class Halving:
    """The rungs of one study. ``report`` decides; ``take_up`` repeats what was decided before.

    Trials at a rung have used the same resource, so the comparison is at equal cost if the caller counts resources in
    units of cost. They may be at different points of their schedules, and who is nearer to the end of its schedule
    looks better for that reason alone. So the share of its own schedule that a trial has behind it
    (``progress``) is one more column to be minimised: a trial is dominated only by those that are no nearer to their
    end. Where whole trainings all cost the same, the column is constant and decides nothing.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.decisions: list[Decision] = []
        self._standing: dict[str, Decision] = {}
        self._rungs: dict[float, _Rung] = {}

    def standing(self, trial: str) -> Decision | None:
        """The last decision on a trial."""
        return self._standing.get(trial)

    def report(self, trial: str, resource: float, metrics: Mapping[str, Any], progress: float = 0.0) -> Decision | None:
        """What stands for a trial that has used ``resource`` and measures ``metrics``; None below the first rung.

        The first report at or beyond a rung is compared there (in the highest rung reached; rungs that were passed in
        one step never see it); any other report repeats the decision that stands (the same object), so a trial that is
        trained again gets the same answer. A report of a trial that has ended counts like any other.

        A missing or non-finite objective or constrained metric ranks behind all others, an infeasible trial behind all
        feasible ones, by the sum of its violations; equals rank in the order of their reports.
        """
        resource, progress = float(resource), float(progress)
        rung, standing = self.rules.rung(resource), self.standing(trial)
        if rung is None or (standing is not None and rung <= standing.rung * (1 + 1e-9)):
            return standing
        values = {name: finite_or_none(metrics.get(name)) for name in self.rules.metrics}
        place = self._rungs.setdefault(rung, _Rung(Fronts(len(self.rules.goals) + 1)))
        front, rank = self._add(place, trial, values, progress)
        if front is not None:  # the newest has the highest number
            rank += place.order(front, self.rules.ranking).rank(place.fronts.count - 1) - 1
        of = place.count
        kept = self.rules.share(of)
        broken = any(value is None for value in values.values())
        waits = self.rules.promote and (broken or front is None)
        go_on = rank <= kept and not waits if kept or self.rules.promote else (not broken or rank == 1)
        decision = Decision(trial, rung, resource, progress, values, front, rank, of, go_on)
        self.decisions.append(decision)
        self._stand(decision)
        return decision

    def promote(self, waiting: Collection[str], closing: bool = False, busy: Collection[str] = ()) -> Decision | None:
        """One of ``waiting`` that goes on now, recorded as decided; None if there is none.

        Whoever is among the best share of all that its rung has seen by now; highest rungs first. ``closing``: nothing
        new will ever begin. Then, rung by rung from the lowest, as soon as none of ``busy`` (trials that train) has a
        rung still before it, the best ``Rules.least`` of it go on, so that a small study trains some to their end, too;
        and with ``Rules.rest`` everybody who waits, best first. Trials that were not compared by objectives wait for
        ever.
        """
        rungs = sorted(self._rungs, reverse=True)
        for rung in rungs if waiting else ():
            if found := self._promoted(rung, self.rules.share(self._rungs[rung].count), waiting):
                return found
        if not (waiting and closing):
            return None
        for rung in reversed(rungs):
            if any(self._is_before(trial, rung) for trial in busy):
                break
            if found := self._promoted(rung, self.rules.least, waiting):
                return found
        for rung in rungs if self.rules.rest else ():
            if found := self._promoted(rung, self._rungs[rung].count, waiting):
                return found
        return None

    def _promoted(self, rung: float, kept: int, waiting: Collection[str]) -> Decision | None:
        """The first of the best so many of a rung that waits there."""
        place = self._rungs[rung]
        found = place.first(kept, self.rules.ranking, waiting)
        if found is None:
            return None
        number, rank = found
        standing = self._standing[place.trials[number]]
        decision = replace(standing, rank=rank, of=place.count, go_on=True, promoted=True)
        self.decisions.append(decision)
        self._stand(decision)
        return decision

    def _stand(self, decision: Decision) -> None:
        """From now on this decision on its trial stands."""
        before = self.standing(decision.trial)
        if before is not None:
            self._rungs[before.rung].hold(decision.trial, False)
        self._rungs[decision.rung].hold(decision.trial, not decision.go_on)
        self._standing[decision.trial] = decision

    def _is_before(self, trial: str, rung: float) -> bool:
        standing = self.standing(trial)
        return standing is None or standing.rung < rung

    def _add(
        self, place: _Rung, trial: str, values: Mapping[str, float | None], progress: float
    ) -> tuple[int | None, int]:
        """Add a report to its rung; its front, and its rank if it were the first of its front."""
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) < len(values):
            place.broken += 1
            return None, place.count
        violation = sum(max(c.violation(known[c.metric]), 0.0) for c in self.rules.constraints)
        if violation > 0:
            behind = bisect.bisect_right(place.violations, violation)
            place.violations.insert(behind, violation)
            return None, place.fronts.count + behind + 1
        row = [known[m] * (-1.0 if goal == "maximize" else 1.0) for m, goal in self.rules.goals.items()]
        number = place.numbers[trial] = len(place.trials)
        place.trials.append(trial)
        if number >= len(place.held):
            place.held = np.concatenate([place.held, np.zeros_like(place.held)])
        front = place.fronts.add(np.array([*row, progress]))
        return front, place.fronts.ahead_of(front) + 1

    def ranked(self, rung: float) -> list[tuple[str, int]]:
        """The trials that were compared by objectives at a rung, best first, each with its front."""
        place = self._rungs[rung]
        return [
            (place.trials[number], front)
            for front in range(len(place.fronts.fronts))
            for number in place.order(front, self.rules.ranking).best
        ]

    # --- state

    def take_up(self, decisions: Iterable[Decision]) -> None:
        """Continue from recorded decisions, in any order: ``of`` numbers those of a rung. Each stands as recorded."""
        for recorded in sorted(decisions, key=rung_order):
            place = self._rungs.setdefault(recorded.rung, _Rung(Fronts(len(self.rules.goals) + 1)))
            if not recorded.promoted:
                values = {name: finite_or_none(recorded.values.get(name)) for name in self.rules.metrics}
                self._add(place, recorded.trial, values, recorded.progress)
            self.decisions.append(recorded)
            standing = self.standing(recorded.trial)
            if standing is None or standing.rung < recorded.rung or recorded.promoted:
                self._stand(recorded)

    def state(self) -> list[dict[str, Any]]:
        """All there is to know, as plain JSON data: ``take_up(map(Decision.of_event, state))`` goes on from it."""
        return [decision.to_dict() for decision in self.decisions]


def following(
    halving: Halving, waiting: Collection[str], draw: Callable[[], New | None], busy: Collection[str]
) -> Decision | New | None:
    """Who gets a place that is free: one that waits and is among the best by now, else a new one that ``draw`` brings.

    Without a new one the search is closing (``Halving.promote``). None: nobody for now, and nobody at all once nobody
    is ``busy`` either. Studies and simulations ask here, so that they cannot differ.
    """
    return halving.promote(waiting) or draw() or halving.promote(waiting, closing=True, busy=busy)


def replayed(rules: Rules, decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions that ``rules`` make on the reports behind recorded ones, rung by rung in the order of reports.

    Who was promoted is promoted again where it was among the best after so many reports, and else is missing.
    """
    again = Halving(rules)
    for recorded in sorted(decisions, key=rung_order):
        if recorded.promoted:
            again.promote({recorded.trial}, closing=True)
        else:
            again.report(recorded.trial, recorded.resource, recorded.values, recorded.progress)
    return again.decisions
