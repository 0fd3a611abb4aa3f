"""The course of a study as a state machine: which trial starts, what must be verified, when a trial is complete.

Nothing here knows Ray, so the whole course can be tested and replayed. Every change of state is first appended to
``trials.jsonl`` and then told to the sampler and to the listeners: what is not recorded has not happened.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cactus_ray.config import RunConfig, parse
from cactus_ray.errors import UserError
from cactus_ray.search.afterwards import Afterwards
from cactus_ray.search.attempts import DEATHS, Attempts
from cactus_ray.search.budget import Budget
from cactus_ray.search.chunks import (
    DEAR,
    DEAR_BOUNDS,
    Chunk,
    ChunkResult,
    LevelResult,
    Pieces,
    Verification,
    Worth,
    counts,
)
from cactus_ray.search.fresh import SPLIT as FRESH_SPLIT
from cactus_ray.search.in_flight import forget_state, forget_states, keep_state
from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.past import past_trial
from cactus_ray.search.points import Suggested
from cactus_ray.search.rivals import Rivals
from cactus_ray.search.rungs import Cost, Rungs
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, TrialRecord
from cactus_ray.search.work import ALIVE_SECONDS

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class TrialStart:
    """A trial that shall be trained.

    ``asked``: epochs after which it waits for an answer; ``scored``: epochs after which the proxies are measured.
    ``state``: after ``epoch`` epochs, from which it goes on; ``attempt``: counts the processes that trained it.
    """

    id: str
    number: int
    config: RunConfig
    asked: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    epoch: int = 0
    state: bytes | None = None
    attempt: int = 1


class Study:
    """One study. ``samples`` are the indices into the selection split that every level is verified on.

    A new study begins with an ``study`` event; given the records of an earlier driver it goes on: complete, failed and
    stopped trials are kept, trained ones are only verified where they have no verdict yet, and those that were training
    go on from the last state that was kept of them, or else are trained again with the same configuration. ``cost``: of
    an epoch, for halving (see ``rungs.epoch_costs``); without it every epoch costs 1. ``fresh``: indices on which
    front points are verified once more, after the search.
    """

    def __init__(
        self,
        space: Space,
        store: RunStore,
        records: Records,
        samples: Sequence[int],
        listeners: Sequence[Listener] = (),
        cost: Cost | None = None,
        fresh: Sequence[int] = (),
    ) -> None:
        self.space, self.store, self.listeners = space, store, list(listeners)
        self.sampler = OptunaSampler(space)
        self.sampler.replay(records)
        self.rungs = Rungs(space, records, cost)
        self.worth: Worth | None = self._may_reach_the_front if space.search.dear == "front" else None
        self.rivals = Rivals(space.front, records.points())
        self.suggested = Suggested(store.path, space)
        self.budget = Budget(space, records)
        self.pieces = Pieces(
            tuple(space.levels),
            tuple(samples),
            space.resources.cheap_samples,
            space.resources.dear_samples,
            space.verification.bound in DEAR_BOUNDS,
        )
        self.after = Afterwards(space, store, records, replace(self.pieces, samples=tuple(fresh)))
        self.reference: dict[str, float] = dict(records.study.get("reference_point", {}))
        self.configs: dict[str, RunConfig] = {}
        self.numbers: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self.verifying: dict[str, Verification] = {}
        self.training: set[str] = set()
        self.restart: list[TrialStart] = []
        self.earlier: dict[str, TrialRecord] = {}
        self.attempts = Attempts(store.path, records)
        self.said = time.monotonic()
        self.waiting: list[str] = []
        self.spent = {trial.id: sum(trial.ledger.values()) for trial in records.trials.values() if trial.ledger}
        self.lowered = records.lowered
        self.losses = {chunk: n for trial in records.trials.values() for chunk, n in trial.losses.items()}
        self.finished = sum(t.status in ("completed", "failed", "stopped") for t in records.drawn())
        for trial in records.trials.values():
            self._take_up(trial)
        forget_states(store.path, {start.id for start in self.restart})

    def _take_up(self, trial: TrialRecord) -> None:
        self.numbers[trial.id] = trial.number
        if trial.status not in ("running", "trained"):
            return
        if trial.status == "running" and self.rungs.stopped(trial.id):  # the last driver died with the answer
            self.work()
            self.stopped(trial.id)
            return
        config = parse(RunConfig, trial.config)
        self.configs[trial.id] = config
        self.earlier[trial.id] = trial
        if trial.status == "running" or not self._kept(trial):
            self.restart.append(self._start(trial.id, trial.number, config))
            return
        self.verifying[trial.id] = Verification.of(trial, trial.id, self.pieces, trial.train_seconds or 0.0)
        self.waiting.append(trial.id)

    def _kept(self, trial: TrialRecord) -> bool:
        """Whether the network that the verdicts are about is still there."""
        path = self.store.path / (trial.checkpoint or "missing")
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == trial.sha256

    def resume(self) -> list[Chunk]:
        """What is still to be verified of the trials that an earlier driver had trained. To be called once."""
        waiting, self.waiting = self.waiting, []
        return [chunk for trial in waiting for chunk in self._advance(trial)]

    def checkpoint(self, trial: str) -> Path:
        """The network of a trained trial that is verified."""
        return self.store.path / "checkpoints" / f"{trial}.safetensors"

    # --- what the driver asks

    @property
    def in_flight(self) -> int:
        """Trials that train or wait for verdicts."""
        return len(self.training) + len(self.verifying)

    @property
    def done(self) -> bool:
        """Whether no trial will start any more and none is in flight."""
        if self.in_flight or self.after.verifying:
            return False
        return bool(self.budget.over() or (self.searched and not self.restart and self.after.settled()))

    @property
    def searched(self) -> bool:
        """Whether the search itself is over: none of its trials is in flight, and none will start any more."""
        enough = self.finished >= self.space.search.trials or self.sampler.exhausted or self.budget.enough()
        return bool(enough) and not self._under_way() and not self.after.own(start.id for start in self.restart)

    def _under_way(self) -> int:
        """Trials in flight that count as trials of the search."""
        return len(self.after.own((*self.training, *self.verifying)))

    def next_trial(self) -> TrialStart | None:
        """The next trial to train, recorded as started; None if there is none to start."""
        if self.budget.over():
            return None
        if self.restart:
            start = self.restart.pop(0)
            kept, attempt = self.attempts.next(start.id, start.config)
            start = replace(start, epoch=kept.epoch, state=kept.data, attempt=attempt)
        else:
            drawn = None if self.budget.enough() else self._draw()
            drawn = drawn or self._replicate()
            if drawn is None:
                return None
            start = drawn
        self.training.add(start.id)
        self.configs[start.id] = start.config
        return start

    def _draw(self) -> TrialStart | None:
        """Ask the sampler until it proposes a configuration that can be built; refused ones are recorded as failed."""
        while self.finished + self._under_way() < self.space.search.trials:
            self.sampler.enqueue(self.suggested.new())
            suggestion = self.sampler.ask()
            if suggestion is None:
                return None
            trial = f"t{suggestion.number:04d}"
            self.numbers[trial] = suggestion.number
            started = {"event": "started", "trial": trial, "number": suggestion.number, "parameters": suggestion.values}
            started |= {"origin": suggestion.origin} | ({"note": suggestion.note} if suggestion.note else {})
            try:
                config = self.space.configuration(suggestion.values, suggestion.number)
                cost = self.rungs.epoch_cost(config)
            except UserError as error:
                self._emit({**started, "config": {}, "config_hash": "", "seed": 0})
                self.failed(trial, str(error))
                continue
            plain = {"config": config.to_dict(), "config_hash": config.config_hash, "seed": config.seed}
            self._emit({**started, **plain, "epoch_cost": cost})
            return self._start(trial, suggestion.number, config)
        return None

    def _replicate(self) -> TrialStart | None:
        """The next replicate, once the search is over. The sampler and ``search.trials`` know nothing of it."""
        wanted = self.after.next() if self.searched else None
        if wanted is None:
            return None
        number = self.numbers[wanted.id] = self.numbers[wanted.of]
        event, config = self.after.started(wanted, number, self.rungs.epoch_cost)
        self._emit(event)
        return self._start(wanted.id, number, config)

    def afterwards(self) -> list[Chunk]:
        """What is to be verified on fresh samples, once the search is over; nothing when asked again."""
        if not self.searched or self.budget.over():
            return []
        return [chunk for state in self.after.begin() for chunk in self._look_again(state.trial)]

    def _start(self, trial: str, number: int, config: RunConfig) -> TrialStart:
        if trial in self.after.of:  # to be compared with its original, which went to its end
            return TrialStart(trial, number, config)
        return TrialStart(trial, number, config, self.rungs.asked(config), self.rungs.scored(config))

    # --- what happens

    def begun(self, trial: str, epoch: int) -> None:
        """The process that trains a trial is there, and goes on after so many epochs."""
        self._emit({"event": "begun", "trial": trial, "epoch": epoch, **self.attempts.begun(trial)})

    def saved(self, trial: str, epoch: int, data: bytes) -> None:
        """The state of a trial after an epoch arrived: a later driver, or another process, goes on from it."""
        keep_state(self.store.path, trial, epoch, data)

    def died(self, trial: str, reason: str) -> None:
        """The process that trained a trial died. Another one goes on, unless too many died before the same epoch."""
        epoch = self.attempts.furthest(trial)
        self._emit({"event": "died", "trial": trial, "epoch": epoch, "reason": reason})
        if self.attempts.died(trial):
            self.failed(trial, f"{reason}, {DEATHS} times in epoch {epoch + 1}")
            return
        self.training.discard(trial)
        self.restart.append(self._start(trial, self.numbers[trial], self.configs[trial]))

    def alive(self) -> None:
        """Write that the driver works, where nothing else was written for long: so it is known when it was killed."""
        if time.monotonic() - self.said >= ALIVE_SECONDS:
            self._emit({"event": "alive"})

    def epoch(
        self, trial: str, epoch: int, epochs: int, metrics: Mapping[str, float], gpus: float | None = None
    ) -> bool:
        """An epoch of a trial ended; whether the trial goes on. A new decision is recorded with all that led to it.

        ``gpus``: those of a worker, where it has any; trials that share one have a part of it.
        """
        ended = {"event": "epoch", "trial": trial, "epoch": epoch, "epochs": epochs, "metrics": dict(metrics)}
        self._emit(ended | ({} if gpus is None else {"gpus": gpus}))
        self.attempts.reach(trial, epoch)
        own = trial not in self.after.of
        if own and (decision := self.rungs.report(trial, self.configs[trial], epoch, metrics)) is not None:
            self._emit({"event": "rung", "epoch": epoch, **decision.to_dict()})
        return self.rungs.stopped(trial) is None

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
        digest = hashlib.sha256(network).hexdigest()
        self._emit(
            {
                "event": "trained", "trial": trial, "epochs": epochs, "train_seconds": seconds,
                "checkpoint": path.relative_to(self.store.path).as_posix(), "sha256": digest,
            }
        )  # fmt: skip
        self.training.discard(trial)
        forget_state(self.store.path, trial)
        earlier = self.earlier.pop(trial, None)  # the same weights again, whose file was lost: verdicts still hold
        same = earlier if earlier is not None and earlier.sha256 == digest else None
        self.verifying[trial] = Verification.of(same, trial, self.pieces, seconds)
        return self._advance(trial)

    def verified(self, result: ChunkResult) -> list[Chunk]:
        """Verdicts of a chunk arrived; a second delivery changes nothing. Returns what has to be verified next."""
        return self._take(result.chunk, result.levels, {"ledger": result.ledger})

    def given_up(self, chunk: Chunk, reason: str, labels: Sequence[int]) -> list[Chunk]:
        """Nobody will verify a chunk: its samples are UNKNOWN for ``reason``. Returns what has to be verified next."""
        state = self.verifying.get(chunk.trial) or self.after.verifying.get(chunk.trial)
        if state is None:
            return []
        levels = tuple(level for level in chunk.levels if level not in state.spared)
        if not levels:
            return self.withdrawn(chunk)
        return self._take(chunk, state.undecided(replace(chunk, levels=levels), reason, labels), {"ledger": {}})

    def packed(self, packing: Mapping[str, Any]) -> None:
        """Write how many trials share a GPU, and why."""
        self._emit({"event": "packing", **packing})

    def out_of_memory(self, trial: str, packing: Mapping[str, Any]) -> None:
        """A trial ran out of a GPU's memory beside others: it is queued again, and fewer share a GPU from here on."""
        self._emit({"event": "oom", "trial": trial, **packing})
        self.attempts.lacked(trial)
        self.training.discard(trial)
        self.restart.append(self._start(trial, self.numbers[trial], self.configs[trial]))

    def still_worth(self, chunk: Chunk) -> tuple[str, ...]:
        """The levels of a chunk that are to be verified as it is handed out.

        A dear one may have waited long: levels that a complete trial, or another level, has come to beat are spared.
        """
        state = self.verifying.get(chunk.trial)
        if state is None or chunk.stage != DEAR or self.worth is None:
            return chunk.levels
        return tuple(level for level in chunk.levels if self.worth(self._point(chunk.trial, level, state)))

    def withdrawn(self, chunk: Chunk) -> list[Chunk]:
        """No level of a chunk is worth it any more: what is known stays. Returns what has to be verified next."""
        state = self.verifying.get(chunk.trial)
        if state is None or state.open.pop(chunk.id, None) is None:
            return []
        return [] if state.open else self._advance(chunk.trial)

    def refused(self, trial: str, error: str) -> None:
        """The network of a trial cannot be verified at all."""
        if trial in self.verifying:
            self.failed(trial, error)
        elif trial in self.after.verifying:
            self._emit(self.after.seen(trial, error))

    def lost(self, chunk: Chunk, reason: str, seconds: float) -> None:
        """A verifier died or hung with a chunk, after so many seconds."""
        self._emit(
            {"event": "lost", "trial": chunk.trial, "chunk": chunk.id, "reason": reason, "seconds": seconds}
        )  # fmt: skip

    def _take(self, chunk: Chunk, levels: Mapping[str, LevelResult], more: Mapping[str, Any]) -> list[Chunk]:
        fresh = chunk.trial not in self.verifying
        state = self.after.verifying.get(chunk.trial) if fresh else self.verifying[chunk.trial]
        if state is None or chunk.id not in state.open:
            return []
        found = {
            level: {"samples": r.samples, "measures": r.measures, "seconds": r.seconds} for level, r in levels.items()
        }
        self._emit(
            {
                "event": "fresh" if fresh else "verdicts", "trial": chunk.trial, "chunk": chunk.id,
                "stage": chunk.stage, "split": FRESH_SPLIT if fresh else "selection", "levels": found, **more,
            }
        )  # fmt: skip
        state.take(chunk, levels)
        if state.open:
            return []
        return self._look_again(chunk.trial) if fresh else self._advance(chunk.trial)

    def _advance(self, trial: str) -> list[Chunk]:
        """The next chunks of a trial of which nothing is open; without any it is complete."""
        state = self.verifying[trial]
        chunks = state.next_chunks(self.worth, lambda level: self._point(trial, level, state))
        if not chunks:
            self._complete(trial, state)
        return chunks

    def _look_again(self, trial: str) -> list[Chunk]:
        """The next chunks of a trial on fresh samples; without any, what was found is recorded."""
        chunks = self.after.next_chunks(trial)
        if not chunks:
            self._emit(self.after.seen(trial))
        return chunks

    def _may_reach_the_front(self, point: Mapping[str, Any]) -> bool:
        """Whether dear verification of a point can matter to the front; if not, who beats it is recorded."""
        trial, level = point["trial"], point["level"]
        if trial in self.after.of:
            return self.after.worth(point)
        state = self.verifying[trial]
        if level in state.spared:
            return False
        if any(c.metric == f"certified_accuracy@{level}" for c in self.space.constraints):
            return True  # a lower end would decide whether the trial is feasible
        siblings = [self._point(trial, other, state) for other in self.space.levels if other != level]
        rival = self.rivals.of(point, siblings)
        if rival is None:
            return True
        state.spared[level] = [rival["trial"], rival["level"]]
        self._emit({"event": "spared", "trial": trial, "levels": {level: state.spared[level]}})
        return False

    def _complete(self, trial: str, state: Verification) -> None:
        if lost := state.lost:
            self.failed(trial, f"no verifier survived level {lost[0]}")
            return
        points = [self._point(trial, level, state) for level in self.space.levels]
        metrics = trial_metrics(points, state.train_seconds, self.space.front, self.reference)
        self._emit({"event": "completed", "trial": trial, "points": points, "metrics": metrics})
        del self.verifying[trial]
        if trial not in self.after.of:
            self.rivals.add(points)
            self.finished += 1
            self.sampler.tell(self.numbers[trial], metrics, "completed")

    def _point(self, trial: str, level: str, state: Verification) -> dict[str, Any]:
        config = self.configs[trial]
        if trial not in self.hashes:  # dear to work out, and asked for at every level
            self.hashes[trial] = config.config_hash
        return {
            "trial": trial, "level": level, "method": config.method, "seed": config.seed, "split": "selection",
            **counts(state.rows[level].values()), **state.measures[level], "train_seconds": state.train_seconds,
            "verify_seconds": state.seconds[level], "config_hash": self.hashes[trial],
        }  # fmt: skip

    def failed(self, trial: str, error: str, step: int | None = None) -> None:
        """A trial ended without a result. Its name and reason are kept; it never has points."""
        self._emit({"event": "failed", "trial": trial, "error": error, "step": step})
        self._ended(trial, "failed")

    def stopped(self, trial: str, reason: str | None = None, seconds: float | None = None) -> None:
        """A trial was ended early on purpose after so many seconds; without a reason, by the decision at its rung."""
        decision = self.rungs.stopped(trial)
        why = reason or (decision.reason if decision is not None else "asked to")
        known = {} if seconds is None else {"train_seconds": seconds}
        self._emit({"event": "stopped", "trial": trial, "reason": why, **known})
        self._ended(trial, "stopped")

    def _ended(self, trial: str, status: str) -> None:
        self.training.discard(trial)
        forget_state(self.store.path, trial)
        self.verifying.pop(trial, None)
        if trial not in self.after.of:
            self.finished += 1
            self.sampler.tell(self.numbers[trial], None, status)

    def warm(self, past: Mapping[str, Any]) -> None:
        """Take up completed trials of another study (``search.warm``), before the first trial is drawn."""
        self._emit({"event": "past", **past})
        self.sampler.warm([past_trial(row) for row in past["trials"]])

    def begin(self, study: Mapping[str, Any], reference: Mapping[str, float]) -> None:
        """Write the first event of a new study; the reference point of the hypervolume is fixed from here on."""
        self.reference = dict(reference)
        self._emit({"event": "study", "schema": 1, **study, "reference_point": self.reference})

    def work(self) -> None:
        """Write that a driver begins to work: time until the next event of an earlier one was no work."""
        self._emit({"event": "driver"})

    def end(self, status: str, seconds: float) -> None:
        """Write how the driver ended: completed, limit, interrupted or failed; and the limit that was reached."""
        reason = self.budget.enough()
        self._emit({"event": "finished", "status": status, "seconds": seconds} | ({"reason": reason} if reason else {}))

    def _emit(self, event: Event) -> None:
        event = {**self.after.event(event), "time": time.time()}
        self.said = time.monotonic()
        self.store.append(event)
        self.budget.event(event)
        for listener in self.listeners:
            listener(event)
