"""Searcher and scheduler without training: recorded learning curves, or a synthetic surface, in simulated time.

A discrete-event simulation: every worker trains one trial after the other and verifies it; nothing waits for a clock.
What a search finds counts only where it was trained to the end and verified, and every second of a worker is cost,
those of trials that were stopped included.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from cactus_ray.errors import UserError
from cactus_ray.search.domains import Choices
from cactus_ray.search.halving import Decision, Halving, following
from cactus_ray.search.pareto import non_dominated, relative_hypervolume
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.rungs import PROXIES, accuracy_goals, proxy_goals, rules_of, rung_epochs, steady
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.samplers import check_sampler
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.space import Space


@dataclass(frozen=True, slots=True)
class Curve:
    """A configuration with all that training it would show: per epoch, and after verification.

    ``seconds`` and ``metrics``: one entry per epoch; ``outcome``: the metrics of the finished trial; ``epoch_cost``: of
    an epoch at rungs, as the study counted it, the mean of all (here they all cost that); ``score_seconds``: by level,
    of measuring its proxies once, where that is not among ``seconds``.
    """

    values: Mapping[str, Any]
    seconds: tuple[float, ...]
    metrics: tuple[Mapping[str, Any], ...]
    verify_seconds: float
    points: tuple[Mapping[str, Any], ...]
    outcome: Mapping[str, float]
    epoch_cost: float = 1.0
    score_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated. ``trials``: most that are started; ``goals``: what rungs compare (default: the proxies).

    There are no limits: with ``scheduler.rest: promote`` everything is trained to its end.
    """

    sampler: str = "tpe"
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    workers: int = 1
    trials: int
    seed: int = 0
    goals: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A trial was finished: seconds of workers spent by then, simulated time, hypervolume of all that is finished."""

    cost: float
    time: float
    hypervolume: float


@dataclass(slots=True)
class Simulated:
    """What a search came to."""

    steps: list[Step] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    stopped: int = 0
    cost: float = 0.0
    time: float = 0.0

    @property
    def hypervolume(self) -> float:
        return self.steps[-1].hypervolume if self.steps else 0.0

    def cost_of(self, hypervolume: float) -> float:
        """What was spent until this hypervolume was reached; infinite if it never was."""
        return next((step.cost for step in self.steps if step.hypervolume >= hypervolume * (1 - 1e-12)), math.inf)


def recorded_curves(records: Records) -> list[Curve]:
    """The whole curves of a run: trials that are complete and of which every epoch was recorded, as they were drawn."""
    whole = (t for t in records.drawn() if t.status == "completed" and _every_epoch(t))
    return [
        Curve(
            trial.parameters,
            tuple(float(epoch["metrics"].get("seconds") or 0.0) for epoch in trial.epochs),
            tuple(epoch["metrics"] for epoch in trial.epochs),
            sum(trial.ledger.values()),
            tuple(trial.points),
            trial.metrics,
            trial.epoch_cost,
        )
        for trial in whole
    ]


def _every_epoch(trial: TrialRecord) -> bool:
    numbers = [epoch.get("epoch") for epoch in trial.epochs]
    return bool(numbers) and numbers == list(range(1, int(trial.epochs[-1].get("epochs", 0)) + 1))


def comparable(space: Space, curves: Sequence[Curve]) -> dict[str, str]:
    """The metrics that rungs can compare: the proxies, else those without a size, else those of the full network."""
    for goals in (proxy_goals(space.levels), accuracy_goals(space.levels), dict.fromkeys(PROXIES, "maximize")):
        if all(name in metrics for curve in curves for metrics in curve.metrics for name in goals):
            return goals
    raise UserError("the recorded epochs lack the accuracies that rungs compare; expected standard and IBP-certified")


def simulate(space: Space, curves: Sequence[Curve], reference: Mapping[str, float], setup: Setup) -> Simulated:
    """Search among ``curves`` until ``setup.trials`` have been started or none is left.

    ``random`` takes any unused recorded configuration with equal chance. Other samplers propose freely; the unused one
    that is nearest (``distance``) runs in place of a proposal, and its outcome alone is told. ``reference``: the point
    that ``relative_hypervolume`` is measured from. Deterministic.
    Raises UserError for curves that lack what rungs compare.
    """
    goals = setup.goals or comparable(space, curves)
    search = replace(space.search, sampler=setup.sampler, seed=setup.seed, trials=setup.trials)
    space = replace(space, search=search)
    check_sampler(space)
    return _Simulation(space, curves, reference, setup, goals).run()


class _Simulation:
    def __init__(
        self, space: Space, curves: Sequence[Curve], reference: Mapping[str, float], setup: Setup,
        goals: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.space, self.curves, self.reference, self.setup = space, curves, reference, setup
        self.sampler = None if space.search.sampler == "random" else OptunaSampler(space)
        self.random = random.Random(setup.seed)
        self.scored = {level for name in goals for level in _levels_of(name, space.levels)}
        self.halving = Halving(rules_of(setup.scheduler, goals))
        self.waiting: dict[str, tuple[int, int, int]] = {}  # number, curve, epochs done
        self.unused = list(range(len(curves)))
        self.front: list[Mapping[str, Any]] = []
        self.found = Simulated()
        self.events: list[tuple[float, int, int, int, int]] = []  # time, order, trial's number, curve, epochs done
        self.training: set[str] = set()
        self.idle = setup.workers  # those without a trial
        self.order = count()

    def run(self) -> Simulated:
        self._occupy(0.0)
        while self.events:
            now, _, number, index, epoch = heapq.heappop(self.events)
            curve = self.curves[index]
            self.found.time = now
            if epoch <= len(curve.seconds):
                self._epoch(now, number, index, epoch)
            else:
                self.found.cost += curve.verify_seconds
                self._tell(number, curve.outcome, "completed")
                self._finish(curve)
                self.idle += 1
            self._occupy(now)
        self.found.decisions = self.halving.decisions
        self.found.stopped += len(self.waiting)
        return self.found

    def _occupy(self, now: float) -> None:
        """Give idle workers what follows, if anything does by now."""
        while self.idle and (found := following(self.halving, self.waiting, self._new, self.training)):
            self.idle -= 1
            number, index, epoch = self.waiting.pop(found.trial) if isinstance(found, Decision) else found
            self._train(now, number, index, epoch + 1)

    def _new(self) -> tuple[int, int, int] | None:
        """The next new trial: its number, its curve, no epoch."""
        number = len(self.found.started) + 1
        index = self._drawn(number) if self.unused and number <= self.setup.trials else None
        if index is None:
            return None
        self.unused.remove(index)
        self.found.started.append(index)
        return number, index, 0

    def _train(self, now: float, number: int, index: int, epoch: int) -> None:
        """What comes of a trial next is known after an epoch, or after its verification."""
        curve = self.curves[index]
        if epoch <= len(curve.seconds):
            self.training.add(_name(number))
            end = now + curve.seconds[epoch - 1]
        else:
            self.training.discard(_name(number))
            end = now + curve.verify_seconds
        heapq.heappush(self.events, (end, next(self.order), number, index, epoch))

    def _drawn(self, number: int) -> int | None:
        """The recorded configuration that runs as this trial; None when the sampler has no more."""
        if self.sampler is None:  # those on record were drawn at random, so any of them will do
            return self.random.choice(self.unused)
        suggestion = self.sampler.ask()
        if suggestion is None:
            return None
        index = nearest(self.space, suggestion.values, self.curves, self.unused)
        if dict(self.curves[index].values) != suggestion.values:
            self.sampler.adopt(number, self.curves[index].values)
        return index

    def _tell(self, number: int, metrics: Mapping[str, float] | None, status: str) -> None:
        if self.sampler is not None:
            self.sampler.tell(number, metrics, status)

    def _epoch(self, now: float, number: int, index: int, epoch: int) -> None:
        curve, epochs = self.curves[index], len(self.curves[index].seconds)
        self.found.cost += curve.seconds[epoch - 1]
        scoring = 0.0
        if self._asked(curve, epoch):
            scoring = sum(curve.score_seconds.get(level, 0.0) for level in self.scored)
            self.found.cost += scoring
            decision = self.halving.report(
                _name(number), epoch * curve.epoch_cost, curve.metrics[epoch - 1], epoch / epochs
            )
            if decision is not None and not decision.go_on:
                self.training.discard(decision.trial)
                if self.halving.rules.promote:
                    self.waiting[decision.trial] = number, index, epoch
                else:
                    self.found.stopped += 1
                    self._tell(number, None, "stopped")
                self.idle += 1
                return
        self._train(now + scoring, number, index, epoch + 1)

    def _asked(self, curve: Curve, epoch: int) -> bool:
        s = self.setup.scheduler
        at = rung_epochs(self.halving.rules, s.min_epochs, len(curve.seconds), steady(curve.epoch_cost))
        return s.name != "none" and epoch in at

    def _finish(self, curve: Curve) -> None:
        points = [*self.front, *curve.points]
        keep = non_dominated(points, self.space.front)
        self.front = [point for point, on_front in zip(points, keep, strict=True) if on_front]
        volume = relative_hypervolume(self.front, self.space.front, self.reference)
        self.found.steps.append(Step(self.found.cost, self.found.time, volume))


def _name(number: int) -> str:
    return f"t{number:04d}"


def _levels_of(metric: str, levels: Sequence[str]) -> Sequence[str]:
    """The levels at which something is measured for a metric: its own, or all for one over all of them."""
    own = metric.partition("@")[2]
    return (own,) if own else levels


def nearest(space: Space, values: Mapping[str, Any], curves: Sequence[Curve], among: Sequence[int]) -> int:
    """The index among ``among`` of the recorded configuration nearest to ``values``; ties go to the first."""
    return min(among, key=lambda index: (distance(space, values, curves[index].values), index))


def distance(space: Space, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Squared distance of two configurations, every range scaled to [0, 1] (logarithmic ones by their logarithm).

    Choices that differ, and a parameter that only one of the two has, count 1.
    """
    total = 0.0
    for parameter in space.parameters:
        name, domain = parameter.name, parameter.domain
        if name not in one and name not in other:
            continue
        if name not in one or name not in other:
            total += 1.0
        elif isinstance(domain, Choices):
            total += float(_plain(one[name]) != _plain(other[name]))
        else:
            total += (domain.share(one[name]) - domain.share(other[name])) ** 2
    return total


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
