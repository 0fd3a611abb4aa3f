"""The sections of a search space: those that are about the search itself, and the table of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cactus_ray.config import DataConfig, ModelConfig, ThreatConfig, TrainConfig, setting
from cactus_ray.errors import ConfigError
from cactus_ray.search.domains import leaf_keys
from cactus_ray.search.ranking import RANKINGS
from cactus_ray.verification.verdict import VerificationSettings

SCHEDULERS = ("none", "asha")
RESTS = ("stop", "promote")
SAMPLERS = ("tpe", "nsga2", "nsga3", "gp", "cmaes", "random", "grid")
KEEP = ("front", "all")
EXECUTIONS = ("auto", "train", "direct")
WANDB_MODES = ("auto", "online", "offline", "disabled")
VERIFIERS_PART = 0.2
"""Part of a GPU that all verifiers together have beside trials, where nothing else is said."""
TINY = 1e-9
"""Slack of sums of fractions: ten tenths are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Which trials end early or wait: multi-objective successive halving on proxies at the extreme levels."""

    name: str = setting("none", doc="none, or asha: multi-objective successive halving", choices=SCHEDULERS)
    reduction: float = setting(
        3.0, doc="the best 1/reduction at a rung go on; rungs are this factor apart", exclusive_minimum=1.0
    )
    min_epochs: int = setting(
        1, doc="no trial is stopped before; the first rung costs as much as these epochs of the reference", minimum=1
    )
    ranking: str = setting("hypervolume", doc="order within a non-dominated front", choices=tuple(RANKINGS))
    promote: bool = setting(
        True,
        doc="a trial that is not among the best waits with its state kept, and goes on once it is; false: it stops",
    )
    rest: str = setting(
        "stop", choices=RESTS,
        doc="trials that still wait at the end stop, or go on, best first, until max_hours, max_gpu_hours or plateau",
    )  # fmt: skip
    score: str = setting(
        "rungs", doc="measure the proxies at rungs only, or after all epochs: whole curves for cactus-ray simulate",
        choices=("rungs", "epochs"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.rest == "promote" and not self.promote:
            raise ConfigError("rest", self.rest, "stop: with promote: false nobody waits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How many trials are drawn, and how."""

    trials: int = setting(12, doc="trials of the study", minimum=1)
    sampler: str = setting(
        "tpe", doc="tpe, nsga2 and nsga3 (evolution), gp (Gaussian process), cmaes, random or grid", choices=SAMPLERS
    )
    seed: int = setting(
        0, doc="seed of the study, from which every trial's seed is derived", minimum=0, maximum=2**31 - 1
    )
    concurrency: int | None = setting(
        None, doc="trials at once; default: as many as fit. 1 makes the study reproducible", minimum=1
    )
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings, metadata={"doc": "early stopping"})
    dear: str = setting(
        "front", doc="alpha and branch for points that may still reach the front, or for all", choices=("front", "all")
    )
    max_trials: int | None = setting(None, doc="start no more trials than this, whatever became of them", minimum=1)
    max_hours: float | None = setting(
        None, doc="end after this many hours of work, over all drivers; time between them does not count",
        exclusive_minimum=0.0,
    )  # fmt: skip
    max_gpu_hours: float | None = setting(
        None, doc="end after this many hours of GPUs, of training and verification", exclusive_minimum=0.0
    )
    plateau: int | None = setting(
        None, doc="start no more trials when this many complete ones in a row did not improve the hypervolume",
        minimum=1,
    )  # fmt: skip
    plateau_gain: float = setting(0.001, doc="relative gain in hypervolume that counts as an improvement", minimum=0.0)
    seeds: int = setting(
        1, doc="seeds per configuration on the front: after the search, until dominance is settled or all are used",
        minimum=1,
    )  # fmt: skip
    fresh_samples: int | None = setting(
        None, minimum=0,
        doc="selection samples that the search did not use, on which front points are verified once more; default: as "
        "many as it used, as far as there are any",
    )  # fmt: skip
    keep: str = setting("front", doc="networks that are kept: those with a point on the front, or all", choices=KEEP)

    def __post_init__(self) -> None:
        limits = (self.max_hours, self.max_gpu_hours, self.plateau)
        if self.scheduler.rest == "promote" and limits == (None, None, None):
            expected = "stop where none of search.max_hours, max_gpu_hours and plateau ends the search"
            raise ConfigError("scheduler.rest", self.scheduler.rest, f"{expected}: every trial would be trained whole")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSettings:
    """What a trial and the verifiers ask of the cluster."""

    workers: int = setting(1, doc="training workers of a trial", minimum=1)
    cpus_per_worker: float = setting(1.0, doc="CPUs of a worker", exclusive_minimum=0.0)
    gpus_per_worker: float = setting(0.0, doc="GPUs of a worker; a part of one lets trials share it", minimum=0.0)
    trials_per_gpu: int | None = setting(
        None, word="auto", doc="trials that share a GPU; auto: as many as its memory has room for, and 4 at most",
        minimum=1,
    )  # fmt: skip
    verifiers: int = setting(1, doc="verifier actors", minimum=1)
    cpus_per_verifier: float = setting(1.0, doc="CPUs of a verifier", exclusive_minimum=0.0)
    gpus_per_verifier: float | None = setting(
        None, word="auto", minimum=0.0,
        doc="GPUs of a verifier; a part of one lets several share it; auto: where a worker has a GPU or a part of one, "
        "all verifiers together have a fifth of one, which trials leave them",
    )  # fmt: skip
    cheap_samples: int = setting(
        50, minimum=1,
        doc="samples of a verifier's task of attacks, IBP and CROWN, at all levels; fewer where so many are estimated "
        "to take longer than ten minutes",
    )  # fmt: skip
    dear_samples: int = setting(
        4, doc="samples of a task of what alpha or branch asks for; few, so that verifiers end together", minimum=1
    )
    verify_seconds_per_trial: float = setting(
        0.0,
        doc="seconds of verifiers after which a trial gets no dear task and open samples stay UNKNOWN; 0: no limit",
        minimum=0.0,
    )
    verify_seconds_per_study: float = setting(
        0.0, doc="the same for all trials together, drivers that died included; 0: no limit", minimum=0.0
    )
    hang_seconds: float = setting(
        1800.0,
        doc="a verifier that works longer on a task, beyond the seconds per sample and three times what the task is "
        "estimated to take, is taken for hung and replaced",
        exclusive_minimum=0.0,
    )
    state_seconds: float = setting(
        60.0,
        doc="the state of a trial that trains is kept after an epoch, at most once in so many seconds, for a later "
        "driver; 0: after every epoch",
        minimum=0.0,
    )
    execution: str = setting("auto", doc="train: Ray Train; direct: in the trial's actor", choices=EXECUTIONS)
    threads: int = setting(1, doc="torch threads of a worker or verifier", minimum=1)

    def __post_init__(self) -> None:
        for key in ("gpus_per_worker", "gpus_per_verifier"):
            gpus: float = getattr(self, key) or 0.0
            if gpus > 1 and not gpus.is_integer():
                raise ConfigError(key, gpus, "a part of one GPU, or a whole number of them")
        if (self.trials_per_gpu or 1) > 1 and (self.workers, self.gpus_per_worker) != (1, 1.0):
            expected = "auto or 1 unless workers is 1 and gpus_per_worker is 1: they share what one would have alone"
            raise ConfigError("trials_per_gpu", self.trials_per_gpu, expected)
        if self.execution == "direct" and self.workers > 1:
            raise ConfigError("execution", self.execution, f"auto or train: direct runs one worker, not {self.workers}")

    @property
    def trials_part(self) -> float:
        """The part of a GPU that is for trials where ``gpus_per_verifier`` is auto; else all of it."""
        shared = self.gpus_per_verifier is None and 0.0 < self.gpus_per_worker <= 1.0
        return 1.0 - VERIFIERS_PART if shared else 1.0

    @property
    def worker_gpus(self) -> float:
        """GPUs that a worker asks Ray for: ``gpus_per_worker``, less what its share leaves to verifiers."""
        gpus = self.gpus_per_worker
        if not 0.0 < gpus <= 1.0:
            return gpus
        return _in_units(min(gpus, self.trials_part / int(1.0 / gpus + TINY)))

    @property
    def verifier_gpus(self) -> float:
        """GPUs that a verifier asks Ray for."""
        if self.gpus_per_verifier is not None:
            return self.gpus_per_verifier
        return _in_units((1.0 - self.trials_part) / self.verifiers)


def _in_units(gpus: float) -> float:
    """Ray counts in ten-thousandths and rounds up from a half: rounded down, parts that fill a GPU fit it."""
    return math.floor(gpus * 10_000 + TINY) / 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbSettings:
    """Where the study is tracked. ``auto``: online with a key, offline without."""

    mode: str = setting("auto", doc="whether and where to track", choices=WANDB_MODES)
    project: str = setting("cactus", doc="W&B project")
    entity: str | None = setting(None, doc="W&B team or user; default: the key's own")


RUN_SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelConfig, "threat": ThreatConfig, "train": TrainConfig}
SECTIONS: dict[str, type] = RUN_SECTIONS | {
    "search": SearchSettings, "verification": VerificationSettings, "resources": ResourceSettings,
    "wandb": WandbSettings,
}  # fmt: skip
KEYS = (
    "name", "data", "model", "threat", "levels", "train", "parameters", "objectives", "constraints", "front",
    "search", "verification", "resources", "wandb",
)  # fmt: skip


def section_of(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of a plain space, empty where it is missing; ConfigError if it is no mapping."""
    data = {} if raw.get(key) is None else raw[key]
    if not isinstance(data, Mapping):
        names = ", ".join(name for name, _ in leaf_keys(SECTIONS[key]))
        raise ConfigError(key, data, f"a mapping with keys {names}")
    return data
