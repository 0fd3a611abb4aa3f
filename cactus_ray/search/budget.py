"""When a study has done enough: hard limits and the plateau of the hypervolume, followed from its events alone.

Limits count work: hours in which a driver worked, whatever lay between drivers. What an earlier driver spent is read
from the records, so a limit holds over all drivers of a run. An epoch that was trained twice is work done twice.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cactus_ray.search.pareto import Front, relative_hypervolume
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space


class Plateau:
    """Complete trials in a row that did not raise the hypervolume of all points by ``gain``, relative to itself."""

    def __init__(self, front: Mapping[str, str], gain: float) -> None:
        self.front, self.gain = front, gain
        self.reference: Mapping[str, float] = {}
        self.leading = Front(front)
        self.volume = 0.0
        self.idle = 0

    def add(self, points: Sequence[Mapping[str, Any]]) -> None:
        """The points of a trial that is complete."""
        self.leading.add(points)
        volume = relative_hypervolume(self.leading.points, self.front, self.reference)
        improved = volume > self.volume * (1 + self.gain)
        self.idle = 0 if improved else self.idle + 1
        self.volume = volume if improved else self.volume  # small gains add up until they count


class Budget:
    """What a study has spent and gained. ``clock``: seconds in which this driver works."""

    def __init__(self, space: Space, records: Records, clock: Callable[[], float] = time.monotonic) -> None:
        self.search, self.resources, self.clock = space.search, space.resources, clock
        self.begun, self.earlier = clock(), sum(records.drivers)
        self.started = len(records.drawn())
        self.work = copy.deepcopy(records.work)
        self.training = {trial.id: train_seconds(trial) for trial in records.trials.values()}
        self.trained = sum(self.training.values())
        self.gpus = {trial.id: trial.gpus for trial in records.trials.values() if trial.gpus is not None}
        self.on_gpus = training_on_gpus(self.resources, self.training, self.gpus)
        self.verifying = sum(records.ledger().values())
        self.plateau = Plateau(space.front, space.search.plateau_gain)
        self.plateau.reference = records.study.get("reference_point", {})
        if self.search.plateau is not None:
            complete = [t for t in records.drawn() if t.status == "completed"]
            for trial in sorted(complete, key=lambda t: t.ended or 0.0):
                self.plateau.add(trial.points)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take up one event of the study."""
        if event["event"] == "epoch" and "gpus" in event:
            self.gpus[event["trial"]] = float(event["gpus"])
        for trial, seconds in self.work.event(event).items():
            self._train(trial, seconds)
        match event["event"]:
            case "study":
                self.plateau.reference = event["reference_point"]
            case "started" if "of" not in event:  # replicates count in hours alone
                self.started += 1
            case "trained":
                spent = self.training.get(event["trial"], 0.0)
                self._train(event["trial"], max(float(event["train_seconds"]) - spent, 0.0))
            case "verdicts" | "fresh":
                self.verifying += sum(float(s or 0.0) for s in event.get("ledger", {}).values())
            case "lost":
                self.verifying += float(event.get("seconds") or 0.0)
            case "completed" if self.search.plateau is not None and "of" not in event:
                self.plateau.add(event["points"])

    def _train(self, trial: str, seconds: float) -> None:
        self.training[trial] = self.training.get(trial, 0.0) + seconds
        self.trained += seconds
        self.on_gpus += training_on_gpus(self.resources, {trial: seconds}, self.gpus)

    @property
    def hours(self) -> float:
        """Hours in which drivers of this study worked."""
        return (self.earlier + self.clock() - self.begun) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours of GPUs: those of the workers while they trained, those of the verifiers while they verified."""
        return gpu_seconds(self.resources, self.on_gpus, self.verifying) / 3600

    def over(self) -> str | None:
        """Why everything must end now, with what is in flight left for a later driver; None as long as it may go on."""
        limits = self.search
        if limits.max_hours is not None and self.hours >= limits.max_hours:
            return f"search.max_hours: {self.hours:.3g} of {limits.max_hours:g} hours of work"
        if limits.max_gpu_hours is not None and self.gpu_hours >= limits.max_gpu_hours:
            return f"search.max_gpu_hours: {self.gpu_hours:.3g} of {limits.max_gpu_hours:g} hours of GPUs"
        return None

    def enough(self) -> str | None:
        """Why no further trial is started; None as long as one may be. What is in flight goes on, unless ``over``."""
        limits = self.search
        if limits.max_trials is not None and self.started >= limits.max_trials:
            return f"search.max_trials: {self.started} of {limits.max_trials} trials started"
        return self.settled()

    def settled(self) -> str | None:
        """Why no trial that waits goes on any more; None as long as one may."""
        limits = self.search
        if limits.plateau is not None and self.plateau.idle >= limits.plateau:
            gain = f"{100 * limits.plateau_gain:g} %"
            return f"search.plateau: {self.plateau.idle} trials without a gain of {gain} in hypervolume"
        return self.over()


def train_seconds(trial: TrialRecord) -> float:
    """Seconds that a trial trained, again after a kill and in vain among them (``search.work``)."""
    return max(trial.train_seconds or 0.0, trial.worked)


def training_on_gpus(resources: ResourceSettings, training: Mapping[str, float], gpus: Mapping[str, float]) -> float:
    """Seconds of GPUs of trials that trained for so many seconds each. ``gpus``: of a worker, where it is known; trials
    that share a GPU have a part of what ``resources`` say."""
    each = resources.gpus_per_worker
    return sum(seconds * resources.workers * gpus.get(trial, each) for trial, seconds in training.items())


def gpu_seconds(resources: ResourceSettings, training: float, verifying: float) -> float:
    """Seconds of GPUs of so many of training (``training_on_gpus``) and so many seconds of verifiers that work."""
    return training + verifying * resources.verifier_gpus


def cpu_seconds(resources: ResourceSettings, training: float, verifying: float) -> float:
    """Seconds of CPUs, as asked of the cluster."""
    return training * resources.workers * resources.cpus_per_worker + verifying * resources.cpus_per_verifier
