"""The course of a study as a state machine: which trial starts, what must be verified, when a trial is complete.

Nothing here knows Ray, so the whole course can be tested and replayed. Every change of state is first appended to
``trials.jsonl`` and then told to the sampler and to the listeners: what is not recorded has not happened.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cactus_ray.config import RunConfig, parse
from cactus_ray.errors import ConfigError
from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, TrialRecord

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class TrialStart:
    """A trial that shall be trained."""

    id: str
    number: int
    config: RunConfig


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples of one level of one trial that are verified together. ``id`` is the key of their results."""

    id: str
    trial: str
    level: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a verifier found: one compact row per sample, and the measures of the level's network.

    ``samples``: [index, label, verdict, correct, lower_bound, decided_by, seconds]; ``measures``: bytes, ideal_bits,
    macs, or nothing where no verifier survived the chunk.
    """

    chunk: Chunk
    samples: list[list[Any]]
    measures: dict[str, int]
    seconds: float


@dataclass(slots=True)
class _Verification:
    """What is still open of a trained trial."""

    open: set[str]
    train_seconds: float
    samples: dict[str, dict[int, list[Any]]] = field(default_factory=dict)
    measures: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Study:
    """One study. ``samples`` are the indices into the selection split that every level is verified on.

    A new study begins with an ``study`` event; given the records of an earlier driver it goes on: complete, failed and
    stopped trials are kept, trained ones are only verified, and those that were training are trained again with the
    same configuration.
    """

    def __init__(
        self,
        space: Space,
        store: RunStore,
        records: Records,
        samples: Sequence[int],
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.space, self.store, self.listeners = space, store, list(listeners)
        self.sampler = OptunaSampler(space)
        self.sampler.replay(records)
        size = space.verification.batch_size
        self.chunks = [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]
        self.reference: dict[str, float] = dict(records.study.get("reference_point", {}))
        self.configs: dict[str, RunConfig] = {}
        self.numbers: dict[str, int] = {}
        self.verifying: dict[str, _Verification] = {}
        self.training: set[str] = set()
        self.restart: list[TrialStart] = []
        self.resumed: list[tuple[str, Path, list[Chunk]]] = []
        self.finished = sum(t.status in ("completed", "failed", "stopped") for t in records.trials.values())
        for trial in records.trials.values():
            self._take_up(trial)

    def _take_up(self, trial: TrialRecord) -> None:
        self.numbers[trial.id] = trial.number
        if trial.status not in ("running", "trained"):
            return
        config = parse(RunConfig, trial.config)
        self.configs[trial.id] = config
        if trial.status == "running" or not trial.checkpoint or not (self.store.path / trial.checkpoint).is_file():
            self.restart.append(TrialStart(trial.id, trial.number, config))
            return
        chunks = self._begin_verification(trial.id, trial.train_seconds or 0.0)
        self.resumed.append((trial.id, self.store.path / trial.checkpoint, chunks))

    # --- what the driver asks

    @property
    def in_flight(self) -> int:
        """Trials that train or wait for verdicts."""
        return len(self.training) + len(self.verifying)

    @property
    def done(self) -> bool:
        """Whether no trial will start any more and none is in flight."""
        return self.finished >= self.space.search.trials and not self.in_flight and not self.restart

    def next_trial(self) -> TrialStart | None:
        """The next trial to train, recorded as started; None if there is none to start."""
        if self.restart:
            start = self.restart.pop(0)
        else:
            if self.finished + self.in_flight >= self.space.search.trials:
                return None
            drawn = self._draw()
            if drawn is None:
                return None
            start = drawn
        self.training.add(start.id)
        self.configs[start.id] = start.config
        return start

    def _draw(self) -> TrialStart | None:
        """Ask the sampler until it proposes a configuration that can be built; refused ones are recorded as failed."""
        while self.finished + self.in_flight < self.space.search.trials:
            suggestion = self.sampler.ask()
            trial = f"t{suggestion.number:04d}"
            self.numbers[trial] = suggestion.number
            started = {"event": "started", "trial": trial, "number": suggestion.number, "parameters": suggestion.values}
            try:
                config = self.space.configuration(suggestion.values, suggestion.number)
            except ConfigError as error:
                self._emit({**started, "config": {}, "config_hash": "", "seed": 0})
                self.failed(trial, str(error))
                continue
            plain = {"config": config.to_dict(), "config_hash": config.config_hash, "seed": config.seed}
            self._emit({**started, **plain})
            return TrialStart(trial, suggestion.number, config)
        return None

    # --- what happens

    def epoch(self, trial: str, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """An epoch of a trial ended."""
        self._emit({"event": "epoch", "trial": trial, "epoch": epoch, "epochs": epochs, "metrics": dict(metrics)})

    def trained(
        self, trial: str, networks: Mapping[str, bytes], chosen: str, epochs: int, seconds: float
    ) -> list[Chunk]:
        """Training ended: keep its networks (``last`` and ``best``) and say what has to be verified of the chosen one.

        The chosen one is ``checkpoints/TRIAL.safetensors``, another one ``checkpoints/TRIAL.best.safetensors`` or
        ``.last``.
        """
        network = networks[chosen]
        for name, other in networks.items():
            if other != network:
                self.store.save_checkpoint(f"{trial}.{name}", other)
        path = self.store.save_checkpoint(trial, network)
        self._emit(
            {
                "event": "trained", "trial": trial, "epochs": epochs, "train_seconds": seconds,
                "checkpoint": path.relative_to(self.store.path).as_posix(),
                "sha256": hashlib.sha256(network).hexdigest(),
            }
        )  # fmt: skip
        self.training.discard(trial)
        return self._begin_verification(trial, seconds)

    def _begin_verification(self, trial: str, train_seconds: float) -> list[Chunk]:
        chunks = [
            Chunk(f"{trial}/{level}/{i}", trial, level, indices)
            for level in self.space.levels
            for i, indices in enumerate(self.chunks)
        ]
        self.verifying[trial] = _Verification({c.id for c in chunks}, train_seconds)
        return chunks

    def verified(self, result: ChunkResult) -> None:
        """Verdicts of a chunk arrived; a second delivery of the same chunk changes nothing."""
        chunk = result.chunk
        state = self.verifying.get(chunk.trial)
        if state is None or chunk.id not in state.open:
            return
        self._emit(
            {
                "event": "verdicts", "trial": chunk.trial, "level": chunk.level, "split": "selection",
                "chunk": chunk.id,
                "samples": result.samples, "measures": result.measures, "seconds": result.seconds,
            }
        )  # fmt: skip
        state.open.discard(chunk.id)
        state.samples.setdefault(chunk.level, {}).update({row[0]: row for row in result.samples})
        if result.measures:
            state.measures[chunk.level] = result.measures
        state.seconds[chunk.level] = state.seconds.get(chunk.level, 0.0) + result.seconds
        if not state.open:
            self._complete(chunk.trial, state)

    def _complete(self, trial: str, state: _Verification) -> None:
        config = self.configs[trial]
        if lost := [level for level in self.space.levels if level not in state.measures]:
            self.failed(trial, f"no verifier survived level {lost[0]}")
            return
        points = [self._point(trial, config, level, state) for level in self.space.levels]
        metrics = trial_metrics(points, state.train_seconds, self.space.front, self.reference)
        self._emit({"event": "completed", "trial": trial, "points": points, "metrics": metrics})
        del self.verifying[trial]
        self.finished += 1
        self.sampler.tell(self.numbers[trial], metrics, "completed")

    def _point(self, trial: str, config: RunConfig, level: str, state: _Verification) -> dict[str, Any]:
        rows = list(state.samples[level].values())
        count = {verdict: sum(row[2] == verdict for row in rows) for verdict in ("CERTIFIED", "FALSIFIED", "UNKNOWN")}
        return {
            "trial": trial, "level": level, "method": config.method, "seed": config.seed, "split": "selection",
            "samples": len(rows), "standard_accuracy": sum(bool(row[3]) for row in rows) / len(rows),
            "n_certified": count["CERTIFIED"], "n_falsified": count["FALSIFIED"], "n_unknown": count["UNKNOWN"],
            "certified_accuracy": count["CERTIFIED"] / len(rows), **state.measures[level],
            "train_seconds": state.train_seconds, "verify_seconds": state.seconds[level],
            "config_hash": config.config_hash,
        }  # fmt: skip

    def failed(self, trial: str, error: str, step: int | None = None) -> None:
        """A trial ended without a result. Its name and reason are kept; it never has points."""
        self._emit({"event": "failed", "trial": trial, "error": error, "step": step})
        self._ended(trial, "failed")

    def stopped(self, trial: str, reason: str) -> None:
        """A trial was ended early on purpose."""
        self._emit({"event": "stopped", "trial": trial, "reason": reason})
        self._ended(trial, "stopped")

    def _ended(self, trial: str, status: str) -> None:
        self.training.discard(trial)
        self.verifying.pop(trial, None)
        self.finished += 1
        self.sampler.tell(self.numbers[trial], None, status)

    def begin(self, study: Mapping[str, Any], reference: Mapping[str, float]) -> None:
        """Write the first event of a new study; the reference point of the hypervolume is fixed from here on."""
        self.reference = dict(reference)
        self._emit({"event": "study", "schema": 1, **study, "reference_point": self.reference})

    def end(self, status: str, seconds: float) -> None:
        """Write how the driver ended: completed, interrupted or failed."""
        self._emit({"event": "finished", "status": status, "seconds": seconds})

    def _emit(self, event: Event) -> None:
        event = {**event, "time": time.time()}
        self.store.append(event)
        for listener in self.listeners:
            listener(event)
