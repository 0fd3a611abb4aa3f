"""What runs in a verifier's process: chunks in, verdicts of all their levels out."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cactus_ray.cluster.train_workers import describe
from cactus_ray.config import DataConfig, ThreatConfig
from cactus_ray.data import load
from cactus_ray.models.network import Network, unpack
from cactus_ray.search.chunks import CHEAP, DEAR_BOUNDS, Chunk, ChunkResult, LevelResult
from cactus_ray.search.evaluate import LevelNetwork, at_level
from cactus_ray.verification.cascade import SoundnessError
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.timing import stage_seconds
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings

CACHED_NETWORKS, CACHED_LEVELS = 4, 32


@dataclass(frozen=True, slots=True)
class VerifierContext:
    """What every chunk of a study shares. ``gpu``: whether verifiers were given (a part of) a GPU."""

    data: DataConfig
    threat: ThreatConfig
    settings: VerificationSettings
    threads: int
    gpu: bool = False


@dataclass(frozen=True, slots=True)
class ChunkFailure:
    """A chunk that cannot be verified at all: bad input, or a fault of ours; not a lost machine.

    ``unsound``: a certified sample was falsified, so no verdict of the study can be trusted. ``seconds``: of work.
    """

    chunk: Chunk
    error: str
    unsound: bool
    seconds: float


def stage_settings(settings: VerificationSettings, chunk: Chunk) -> VerificationSettings:
    """What is tried on a chunk. Cheap: no more than CROWN. Dear: all, within what the cheap stage left of the seconds.

    The attacks of the cheap stage would find nothing again in the dear stage, so a shorter one with other random starts
    comes in their place.
    """
    if chunk.stage == CHEAP:
        return replace(settings, bound="crown") if settings.bound in DEAR_BOUNDS else settings
    left = settings.seconds_per_sample
    if left > 0:
        left = max(left - chunk.spent, 1e-3)  # 0 would mean: no limit
    steps, seed = -(-settings.attack_steps // 4), (settings.seed + 1) % 2**31
    return replace(settings, attack_steps=steps, restarts=1, seed=seed, seconds_per_sample=left)


class Verifier:
    """Runs the cascade on chunks, with the data and the last levels' networks kept in memory."""

    def __init__(self, context: VerifierContext) -> None:
        torch.set_num_threads(context.threads)
        self.context = context
        self.device = "cuda" if context.gpu and torch.cuda.is_available() else "cpu"
        self.images, self.labels = load(context.data, ("selection",)).split("selection")
        self.networks: OrderedDict[str, Network] = OrderedDict()
        self.levels: OrderedDict[tuple[str, str], LevelNetwork] = OrderedDict()

    def pid(self) -> int:
        """This verifier's process."""
        return os.getpid()

    def verify(self, chunk: Chunk, network: bytes) -> ChunkResult | ChunkFailure:
        """Verdicts of one chunk, or why there are none: text, because not every exception survives its journey."""
        begin = time.perf_counter()
        try:
            return self._verify(chunk, network, begin)
        except Exception as error:  # whatever it is, the study must learn of it by name
            unsound = isinstance(error, SoundnessError)
            place = f"level {error}: " if isinstance(error, _LevelError) else ""
            return ChunkFailure(chunk, place + describe(error), unsound, time.perf_counter() - begin)

    def _verify(self, chunk: Chunk, network: bytes, begin: float) -> ChunkResult:
        context = self.context
        levels = {level: self._level(chunk, level, network) for level in chunk.levels}
        indices = torch.tensor(chunk.indices)
        models = {
            name: LevelModel(level.graph, {key: p.to(self.device) for key, p in level.params.items()})
            for name, level in levels.items()
        }
        with stage_seconds() as ledger:
            found = verify_levels(
                models,
                self.images[indices],
                self.labels[indices],
                list(chunk.indices),
                context.threat,
                stage_settings(context.settings, chunk),
            )
        total = time.perf_counter() - begin
        ledger["overhead"] = max(total - sum(ledger.values()), 0.0)
        shares = _shares(found, total)
        results = {
            name: LevelResult([_row(v) for v in found[name]], level.measures, shares[name])
            for name, level in levels.items()
        }
        return ChunkResult(chunk, results, ledger)

    def _level(self, chunk: Chunk, level: str, data: bytes) -> LevelNetwork:
        key = (chunk.trial, level)
        if key not in self.levels:
            if chunk.trial not in self.networks:
                self.networks[chunk.trial] = unpack(data, chunk.trial)
            _remember(self.networks, chunk.trial, CACHED_NETWORKS)
            network = self.networks[chunk.trial]
            try:
                self.levels[key] = at_level(network, level, self.context.data, self.context.threat.domain)
            except Exception as error:
                raise _LevelError(level) from error
        _remember(self.levels, key, max(CACHED_LEVELS, len(chunk.levels)))
        return self.levels[key]


class _LevelError(Exception):
    """Names the level whose network could not be made."""


def _remember(cache: OrderedDict[Any, Any], key: Any, most: int) -> None:
    """Keep the entries that were asked for last."""
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)


def _row(v: SampleVerdict) -> list[Any]:
    return [v.index, v.label, v.verdict.value, v.correct, v.lower_bound, v.decided_by, round(v.seconds, 6)]


def _shares(found: dict[str, list[SampleVerdict]], total: float) -> dict[str, float]:
    """The seconds of a chunk, shared out to its levels as their samples took them."""
    own = {level: sum(v.seconds for v in verdicts) for level, verdicts in found.items()}
    whole = sum(own.values())
    return {level: total * (seconds / whole if whole > 0 else 1 / len(own)) for level, seconds in own.items()}


def labels_of(data: DataConfig, indices: Sequence[int]) -> list[int]:
    """Labels of samples of the selection split."""
    labels = load(data, ("selection",)).labels["selection"]
    return [int(labels[i]) for i in indices]
