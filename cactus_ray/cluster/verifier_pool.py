"""Verifier actors beside training: chunks of samples go out, verdicts come back, keyed by the chunk's id.

A verifier that dies or hangs loses nothing but its chunk, which is given to another a limited number of times and is
then UNKNOWN for all its samples: a chunk that kills verifiers must not be retried for ever.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from cactus_ray.cluster.train_workers import describe
from cactus_ray.config import DataConfig, ThreatConfig
from cactus_ray.data import load
from cactus_ray.models.network import Network, unpack
from cactus_ray.search.evaluate import LevelNetwork, at_level
from cactus_ray.search.study import Chunk, ChunkResult
from cactus_ray.verification.cascade import SoundnessError, VerificationSettings, verify

MAX_ATTEMPTS = 3
CACHED_LEVELS = 32


@dataclass(frozen=True, slots=True)
class VerifierContext:
    """What every chunk of a study shares."""

    data: DataConfig
    threat: ThreatConfig
    settings: VerificationSettings
    threads: int


@dataclass(frozen=True, slots=True)
class ChunkFailure:
    """A chunk whose level cannot be verified at all: bad input, or a fault of ours; not a lost machine.

    ``unsound``: a certified sample was falsified, so no verdict of the study can be trusted.
    """

    chunk: Chunk
    error: str
    unsound: bool


class Verifier:
    """Runs the cascade on chunks, with the data and the last levels' networks kept in memory."""

    def __init__(self, context: VerifierContext) -> None:
        torch.set_num_threads(context.threads)
        self.context = context
        self.images, self.labels = load(context.data, ("selection",)).split("selection")
        self.networks: OrderedDict[str, Network] = OrderedDict()
        self.levels: OrderedDict[tuple[str, str], LevelNetwork] = OrderedDict()

    def pid(self) -> int:
        """This verifier's process."""
        return os.getpid()

    def verify(self, chunk: Chunk, network: bytes) -> ChunkResult | ChunkFailure:
        """Verdicts of one chunk, or why there are none: text, because not every exception survives its journey."""
        try:
            return self._verify(chunk, network)
        except Exception as error:  # whatever it is, the study must learn of it by name
            return ChunkFailure(chunk, describe(error), isinstance(error, SoundnessError))

    def _verify(self, chunk: Chunk, network: bytes) -> ChunkResult:
        begin = time.perf_counter()
        deployed = self._level(chunk, network)
        indices = torch.tensor(chunk.indices)
        verdicts = verify(
            deployed.graph,
            deployed.params,
            self.images[indices],
            self.labels[indices],
            list(chunk.indices),
            self.context.threat,
            self.context.settings,
        )
        rows = [
            [v.index, v.label, v.verdict.value, v.correct, v.lower_bound, v.decided_by, round(v.seconds, 6)]
            for v in verdicts
        ]
        return ChunkResult(chunk, rows, deployed.measures, time.perf_counter() - begin)

    def _level(self, chunk: Chunk, data: bytes) -> LevelNetwork:
        key = (chunk.trial, chunk.level)
        if key not in self.levels:
            if chunk.trial not in self.networks:
                self.networks[chunk.trial] = unpack(data, chunk.trial)
                _forget(self.networks)
            self.levels[key] = at_level(
                self.networks[chunk.trial], chunk.level, self.context.data, self.context.threat.domain
            )
            _forget(self.levels)
        return self.levels[key]


def _forget(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > CACHED_LEVELS:
        cache.popitem(last=False)


@dataclass(slots=True)
class _Task:
    chunk: Chunk
    network: ray.ObjectRef
    attempts: int = 0


class VerifierPool:
    """``count`` verifier actors and the queue before them. Made and used by the driver alone."""

    def __init__(
        self, context: VerifierContext, count: int, resources: Mapping[str, float], *, chunk_seconds: float = 1800.0
    ) -> None:
        self.context, self.resources, self.chunk_seconds = context, dict(resources), chunk_seconds
        self.queue: deque[_Task] = deque()
        self.busy: dict[ray.ObjectRef, tuple[Any, _Task, float]] = {}
        self.idle = [self._start() for _ in range(count)]

    def _start(self) -> Any:
        return (
            ray.remote(Verifier)
            .options(num_cpus=self.resources.get("CPU", 1.0), num_gpus=self.resources.get("GPU", 0.0))
            .remote(self.context)
        )

    def submit(self, chunks: list[Chunk], network: bytes) -> None:
        """Queue the chunks of one trained network."""
        reference = ray.put(network)
        self.queue.extend(_Task(chunk, reference) for chunk in chunks)

    def drop(self, trial: str) -> None:
        """Forget the chunks of a trial that still wait."""
        self.queue = deque(task for task in self.queue if task.chunk.trial != trial)

    def poll(self, timeout: float) -> list[ChunkResult | ChunkFailure]:
        """Hand out what waits, wait at most ``timeout`` seconds, and return what is finished."""
        while self.queue and self.idle:
            actor, task = self.idle.pop(), self.queue.popleft()
            self.busy[actor.verify.remote(task.chunk, task.network)] = (actor, task, time.monotonic())
        if not self.busy:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(self.busy), num_returns=1, timeout=timeout)
        late = [f for f, (_, _, since) in self.busy.items() if time.monotonic() - since > self.chunk_seconds]
        found = [self._collect(future) for future in ready]
        found += [self._lost(future, "verifier_hung") for future in late if future in self.busy]
        return [f for f in found if f is not None]

    def _collect(self, future: ray.ObjectRef) -> ChunkResult | ChunkFailure | None:
        try:
            result: ChunkResult | ChunkFailure = ray.get(future)
        except ray.exceptions.RayActorError:
            return self._lost(future, "verifier_died")
        actor, _, _ = self.busy.pop(future)
        self.idle.append(actor)
        return result

    def _lost(self, future: ray.ObjectRef, reason: str) -> ChunkResult | None:
        actor, task, _ = self.busy.pop(future)
        ray.kill(actor)
        self.idle.append(self._start())
        task.attempts += 1
        if task.attempts < MAX_ATTEMPTS:
            self.queue.appendleft(task)
            return None
        return self._unknown(task, reason)

    def _unknown(self, task: _Task, reason: str) -> ChunkResult:
        """A chunk that nobody could finish: nothing is claimed about its samples."""
        _, labels = load(self.context.data, ("selection",)).split("selection")
        rows = [[i, int(labels[i]), "UNKNOWN", False, None, reason, 0.0] for i in task.chunk.indices]
        return ChunkResult(task.chunk, rows, {}, 0.0)

    def close(self) -> None:
        """End the actors."""
        for actor in [*self.idle, *(actor for actor, _, _ in self.busy.values())]:
            ray.kill(actor)
        self.idle, self.busy = [], {}
