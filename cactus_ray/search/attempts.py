"""The processes that train trials: from where each goes on, and how many of them died."""

from __future__ import annotations

import logging

from cactus_ray.config import RunConfig
from cactus_ray.search.in_flight import Kept, States
from cactus_ray.search.records import Records

DEATHS = 3
"""So many processes that train a trial may die before its next epoch ends: what kills them may be the trial itself."""

logger = logging.getLogger(__name__)


class Attempts:
    """Follows the attempts at every trial of a run, over all its drivers."""

    def __init__(self, states: States, records: Records) -> None:
        trials = records.trials.values()
        self.states = states
        self.reached = {t.id: max((int(e["epoch"]) for e in t.epochs), default=0) for t in trials}
        self.deaths = {t.id: dict(t.deaths) for t in trials}
        self.lacks = {t.id: t.lacks for t in trials}
        self.promotions = {t.id: sum(decision.promoted for decision in t.rungs) for t in trials}
        self.notes: dict[str, tuple[str, ...]] = {}

    def next(self, trial: str, config: RunConfig) -> tuple[Kept, int]:
        """The state from which the next process goes on, and its number from 1. What cannot be used is said."""
        kept = self.states.kept(trial, config)
        for note in kept.notes:
            logger.warning("%s: %s", trial, note)
        self.notes[trial] = kept.notes
        before = sum(self.deaths.get(trial, {}).values()) + self.lacks.get(trial, 0) + self.promotions.get(trial, 0)
        return kept, 1 + before

    def begun(self, trial: str) -> dict[str, list[str]]:
        """What is to be recorded of a beginning, beside the epoch: the states that were passed over."""
        notes = self.notes.pop(trial, ())
        return {"notes": list(notes)} if notes else {}

    def reach(self, trial: str, epoch: int) -> None:
        """A trial ended an epoch."""
        self.reached[trial] = max(self.furthest(trial), epoch)

    def furthest(self, trial: str) -> int:
        """Epochs that a trial has ever reached."""
        return self.reached.get(trial, 0)

    def died(self, trial: str) -> bool:
        """A process died; whether too many did before the same epoch."""
        deaths, epoch = self.deaths.setdefault(trial, {}), self.furthest(trial)
        deaths[epoch] = deaths.get(epoch, 0) + 1
        return deaths[epoch] >= DEATHS

    def promoted(self, trial: str) -> None:
        """A trial that waited goes on in a new process."""
        self.promotions[trial] = self.promotions.get(trial, 0) + 1

    def lacked(self, trial: str) -> None:
        """A process ran out of GPU memory beside others."""
        self.lacks[trial] = self.lacks.get(trial, 0) + 1
