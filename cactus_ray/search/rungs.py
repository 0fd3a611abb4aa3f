"""Halving in a study: which epochs are scored and judged, by which proxies, and at what cost an epoch counts.

Resources are units of cost: what a trial's epochs so far have cost, in epochs of the study's reference configuration
(every parameter's first value, the largest model) at full epsilon, worked out from passes and multiply-accumulates and
not measured, so that a study can be repeated. Trials at a rung have then cost the same, whatever their number of
epochs, model, method and stage, as far as passes tell (``epoch_costs`` says what they leave out).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cactus_ray.compression.factorize import PART_BITS
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.size import macs
from cactus_ray.config import RunConfig
from cactus_ray.models.network import Network
from cactus_ray.search.halving import Decision, Halving, Rules
from cactus_ray.search.records import Records
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.space import Space
from cactus_ray.training.passes import RAMP, WARM_UP, Phase, estimated_units, phases

Spent = Callable[[int], float]
"""What the first so many epochs of a configuration cost; it grows with every epoch."""
Cost = Callable[[RunConfig], Spent]
PROXIES = ("standard_accuracy", "ibp_certified_accuracy")


def extreme_levels(levels: Sequence[str]) -> tuple[str, ...]:
    """The least and the most compressed level by nominal bits per weight; one where they are the same."""
    bits = {level: nominal_bits(level) for level in levels}
    ends = (max(levels, key=lambda level: bits[level]), min(levels, key=lambda level: bits[level]))
    return tuple(dict.fromkeys(ends))


def nominal_bits(text: str) -> float:
    """Bits per weight of a level by its text alone: 32 for ``dense``, 0.8 for ``prune:gu-l1:0.9+int8``."""
    level = parse_level(text)
    kept = 1.0 - (level.sparsity or 0.0) if level.kept is None else level.kept
    whole = 32 if level.kept is None else PART_BITS
    whole = 16 if level.quantise in ("fp16", "bf16") else whole
    return (kept**2 if level.structured else kept) * (level.bits or whole)


def sized_level(levels: Sequence[str]) -> str | None:
    """The most compressed structured level, if there is one: what is left of a network depends on its weights.

    At other levels the networks of a model are of one size, give or take a few numbers that happen to be 0.
    """
    structured = [level for level in levels if parse_level(level).structured]
    return min(structured, key=nominal_bits) if structured else None


def scored_levels(levels: Sequence[str]) -> tuple[str, ...]:
    """The levels at which rungs measure."""
    sized = sized_level(levels)
    return tuple(dict.fromkeys([*extreme_levels(levels), *([sized] if sized else [])]))


def proxy_goals(levels: Sequence[str]) -> dict[str, str]:
    """The metrics that rungs compare: plain and IBP-certified accuracy at the extreme levels, and a size.

    The size is that at the level where it is a matter of training, if there is one.
    """
    sized = sized_level(levels)
    return accuracy_goals(levels) | ({f"ideal_bits@{sized}": "minimize"} if sized else {})


def accuracy_goals(levels: Sequence[str]) -> dict[str, str]:
    """``proxy_goals`` without the size."""
    return {f"{name}@{level}": "maximize" for level in extreme_levels(levels) for name in PROXIES}


def rung_epochs(rules: Rules, least: int, epochs: int, spent: Spent) -> tuple[int, ...]:
    """The first epochs, from ``least`` on, at or beyond a rung each; never the last of all.

    At its last epoch there is nothing left of a trial to save.
    """
    found, before = [], None
    for epoch in range(least, epochs):
        rung = rules.rung(spent(epoch))
        if rung != before:
            found.append(epoch)
        before = rung
    return tuple(found)


def steady(cost: float) -> Spent:
    """All epochs cost the same."""
    return lambda epochs: epochs * cost


def epoch_costs(reference: RunConfig, build: Callable[[RunConfig], Network]) -> Cost:
    """What epochs of a configuration cost, in epochs of ``reference`` in its first stage at full epsilon.

    Passes of a step (``training.passes``), phase by phase, times multiply-accumulates of the full network, times the
    share of the training split that an epoch passes over. ``build`` makes the untrained network, once per model.

    The warm-up counts like the ramp, or every rung would lie behind the epochs that it is named after. Passes of taps
    and staps are a guess; weights that are ranked, rounded or clustered, and the scores after an epoch, count nothing.
    """
    sizes: dict[Any, tuple[Network, int]] = {}

    def passed(config: RunConfig, phase: Phase) -> float:
        if config.model not in sizes:
            network = build(config)
            sizes[config.model] = network, macs(network.graph, network.params)
        network, size = sizes[config.model]
        share = 1.0 if config.train.epoch_fraction is None else config.train.epoch_fraction
        return estimated_units(config, network.graph, network.params, phase) * size * share

    whole = passed(reference, Phase(phases(reference)[0].stage))

    @functools.lru_cache(maxsize=1024)
    def cost(config: RunConfig) -> Spent:
        found = [(p, passed(config, replace(p, part=RAMP) if p.part == WARM_UP else p) / whole) for p in phases(config)]
        if len({each for _, each in found}) == 1:
            return steady(found[0][1])  # to the last digit as it was before phases were told apart
        return lambda epochs: sum(max(min(epochs, p.end) - p.first, 0.0) * each for p, each in found)

    return cost


def rules_of(settings: SchedulerSettings, goals: Mapping[str, str]) -> Rules:
    """The rules of a scheduler, in a study and where one is simulated.

    Without a space's constraints: they are about trained and verified networks. Most trials that keep one in the end
    still break it at their first rungs, whose ranking would then be by what is broken least and by nothing else.
    """
    s = settings
    return Rules(
        goals=goals, reduction=s.reduction, first=float(s.min_epochs), ranking=s.ranking,
        promote=s.promote and s.name != "none", rest=s.rest == "promote",
    )  # fmt: skip


class Rungs:
    """The scheduler of a study. Without halving it asks nothing and stops nobody; records are the only memory."""

    def __init__(self, space: Space, records: Records, cost: Cost | None = None) -> None:
        self.settings: SchedulerSettings = space.search.scheduler
        self.levels = scored_levels(space.levels)
        s = self.settings
        nobody_asks = s.name == "none" and s.score == "rungs"
        self.cost: Cost = (lambda config: steady(1.0)) if cost is None or nobody_asks else cost
        self.halving = Halving(rules_of(s, proxy_goals(space.levels)))
        self.halving.take_up(decision for trial in records.trials.values() for decision in trial.rungs)

    def epoch_cost(self, config: RunConfig) -> float:
        """What an epoch costs, the mean over a whole training."""
        return self.cost(config)(config.train.epochs) / config.train.epochs

    def asked(self, config: RunConfig) -> tuple[int, ...]:
        """The epochs after which a trial is judged."""
        if self.settings.name == "none":
            return ()
        return rung_epochs(self.halving.rules, self.settings.min_epochs, config.train.epochs, self.cost(config))

    def scored(self, config: RunConfig) -> tuple[int, ...]:
        """The epochs after which the proxies are measured."""
        return tuple(range(1, config.train.epochs + 1)) if self.settings.score == "epochs" else self.asked(config)

    def report(self, trial: str, config: RunConfig, epoch: int, metrics: Mapping[str, Any]) -> Decision | None:
        """A decision on a trial, if this epoch brings a new one."""
        if epoch not in self.asked(config):
            return None
        before = self.halving.standing(trial)
        decision = self.halving.report(trial, self.cost(config)(epoch), metrics, epoch / config.train.epochs)
        return None if decision is before else decision

    def stopped(self, trial: str) -> Decision | None:
        """The decision that ended the training of a trial, for good or for now; None for one that may go on."""
        standing = self.halving.standing(trial)
        return None if standing is None or standing.go_on else standing

    def waits(self, trial: str) -> Decision | None:
        """The decision by which a trial waits, and may be promoted; one that was not compared is stopped for good."""
        standing = self.stopped(trial)
        return standing if self.halving.rules.promote and standing is not None and standing.front is not None else None
