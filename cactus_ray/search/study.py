"""The course of a study as a state machine: which trial starts, what must be verified, when a trial is complete.

Nothing here knows Ray, so the whole course can be tested and replayed. Every change of state is first appended to
``trials.jsonl`` and then told to the sampler and to the listeners (``journal``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cactus_ray.config import RunConfig, parse
from cactus_ray.search.afterwards import Afterwards
from cactus_ray.search.attempts import DEATHS, Attempts
from cactus_ray.search.budget import Budget
from cactus_ray.search.chunks import DEAR_BOUNDS, Chunk, ChunkResult, Pieces
from cactus_ray.search.draws import Draws, TrialStart
from cactus_ray.search.halving import Decision, following
from cactus_ray.search.in_flight import States
from cactus_ray.search.journal import Event, Journal, Listener
from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.past import past_trial
from cactus_ray.search.rivals import Rivals
from cactus_ray.search.rungs import Cost, Rungs
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, TrialRecord
from cactus_ray.search.verifying import Verifying
from cactus_ray.verification.cost import TASK_SECONDS, pace

__all__ = ["Event", "Listener", "Study", "TrialStart"]


class Study(Journal):
    """One study. ``samples`` are the indices into the selection split that every level is verified on.

    A new study begins with an ``study`` event; given the records of an earlier driver it goes on: complete, failed and
    stopped trials are kept, trained ones are only verified where they have no verdict yet, and those that were training
    go on from the last state that was kept of them, or else are trained again with the same configuration. ``cost``: of
    an epoch, for halving (see ``rungs.epoch_costs``); without it every epoch costs 1. ``fresh``: indices on which
    front points are verified once more, after the search.

    ``training``: trials that train; ``restart``: those that trained and go on once there is a place; ``waiting``: those
    that were not among the best of a rung, with the seconds that they trained. Those go on when they have come to be
    (``halving.following``), and count as trials of the search from their start. Once nobody will go on any more, those
    that are left are recorded as stopped; a limit of hours leaves them to a later driver.
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
        pieces = Pieces(
            tuple(space.levels),
            tuple(samples),
            space.resources.cheap_samples,
            space.resources.dear_samples,
            space.verification.bound in DEAR_BOUNDS,
            TASK_SECONDS * pace(space.resources.verifier_gpus > 0),
        )
        after = Afterwards(space, store, records, replace(pieces, samples=tuple(fresh)))
        super().__init__(store, records, Budget(space, records), after, listeners)
        self.space = space
        self.sampler = OptunaSampler(space)
        self.sampler.replay(records)
        self.rungs = Rungs(space, records, cost)
        self.draws = Draws(space, store.path, self.sampler, self.rungs.epoch_cost)
        rivals = Rivals.of_records(space.front, space.constraints, records)
        self.verification = Verifying(space, pieces, rivals, after, self)
        self.configs: dict[str, RunConfig] = {}
        self.numbers: dict[str, int] = {}
        self.training: set[str] = set()
        self.restart: list[TrialStart] = []
        self.waiting: dict[str, float | None] = {}
        self.states = States(store.path)
        self.attempts = Attempts(self.states, records)
        self.spent = {trial.id: sum(trial.ledger.values()) for trial in records.trials.values() if trial.ledger}
        self.lowered = records.lowered
        self.losses = {chunk: n for trial in records.trials.values() for chunk, n in trial.losses.items()}
        self.finished = sum(t.status in ("completed", "failed", "stopped") for t in records.drawn())
        for trial in records.trials.values():
            self._take_up(trial)
        self.states.forget_others({start.id for start in self.restart} | self.waiting.keys())

    def _take_up(self, trial: TrialRecord) -> None:
        self.numbers[trial.id] = trial.number
        if trial.status not in ("running", "waiting", "trained"):
            return
        config = self.configs[trial.id] = parse(RunConfig, trial.config)
        if trial.status == "waiting":
            self.waiting[trial.id] = trial.train_seconds
        elif trial.status == "running" and self.rungs.stopped(trial.id):  # the last driver died with the answer
            self.work()
            self.waits(trial.id)
        elif trial.status == "running" or not self.verification.take_up(trial, config):
            self.restart.append(self._start(trial.id, trial.number, config))

    def resume(self) -> list[Chunk]:
        """See ``Verifying.resume``."""
        return self.verification.resume()

    def checkpoint(self, trial: str) -> Path:
        """See ``Verifying.checkpoint``."""
        return self.verification.checkpoint(trial)

    # --- what the driver asks

    @property
    def in_flight(self) -> int:
        """Trials that train or wait for verdicts."""
        return len(self.training) + len(self.verification.states)

    @property
    def done(self) -> bool:
        """Whether no trial will start any more and none is in flight."""
        if self.in_flight or self.after.verifying:
            return False
        return bool(self.budget.over() or (self.searched and not self.restart and self.after.settled()))

    @property
    def searched(self) -> bool:
        """Whether the search itself is over: none of its trials is in flight or waits, and none will start any more."""
        enough = self.finished >= self.space.search.trials or self.sampler.exhausted or self.budget.enough()
        open_ = self._under_way() or self.waiting or self.after.own(start.id for start in self.restart)
        return bool(enough) and not open_

    def _under_way(self) -> int:
        """Trials in flight that count as trials of the search."""
        return len(self.after.own((*self.training, *self.verification.states)))

    def next_trial(self) -> TrialStart | None:
        """The next trial to train, recorded as started; None if there is none to start."""
        if self.budget.over():
            return None
        if self.restart:
            start = self._resumed(self.restart.pop(0))
        else:
            found = self._search() or self._replicate()
            if found is None:
                return None
            start = found
        self.training.add(start.id)
        self.configs[start.id] = start.config
        return start

    def _search(self) -> TrialStart | None:
        """The next trial of the search, one that waits or a new one. Once there will be none, nobody waits any more."""
        waiting = set() if self.budget.settled() else self.waiting.keys()
        found = following(self.rungs.halving, waiting, self._draw, self.after.own(self.training))
        if isinstance(found, Decision):
            return self._promote(found)
        if found is None and not self._under_way():
            for trial, seconds in list(self.waiting.items()):
                decision = self.rungs.stopped(trial)
                why = f"{decision.reason}; " if decision is not None else ""
                self.stopped(trial, f"{why}it waited there until the search ended", seconds)
        return found

    def _promote(self, decision: Decision) -> TrialStart:
        """A trial that waited goes on from where it was."""
        trial = decision.trial
        self.emit({"event": "rung", "epoch": self.attempts.furthest(trial), **decision.to_dict()})
        del self.waiting[trial]
        self.attempts.promoted(trial)
        return self._resumed(self._start(trial, self.numbers[trial], self.configs[trial]))

    def _resumed(self, start: TrialStart) -> TrialStart:
        """The start of a trial that trained before, from the furthest state that was kept of it."""
        kept, attempt = self.attempts.next(start.id, start.config)
        return replace(start, epoch=kept.epoch, state=kept.data, attempt=attempt)

    def _draw(self) -> TrialStart | None:
        """Ask the sampler until it proposes a configuration that can be built; refused ones are recorded as failed."""
        started = self.finished + len(self.waiting) + self._under_way()
        for _ in range(started, self.space.search.trials):
            if self.budget.enough():
                return None
            drawn = self.draws.next()
            if drawn is None:
                return None
            self.numbers[drawn.id] = drawn.number
            self.emit(drawn.event)
            if drawn.config is not None:
                return self._start(drawn.id, drawn.number, drawn.config)
            self.failed(drawn.id, drawn.error)
        return None

    def _replicate(self) -> TrialStart | None:
        """The next replicate, once the search is over. The sampler and ``search.trials`` know nothing of it."""
        wanted = self.after.next() if self.searched else None
        if wanted is None:
            return None
        number = self.numbers[wanted.id] = self.numbers[wanted.of]
        event, config = self.after.started(wanted, number, self.rungs.epoch_cost)
        self.emit(event)
        return self._start(wanted.id, number, config)

    def afterwards(self) -> list[Chunk]:
        """What is to be verified on fresh samples, once the search is over; nothing when asked again."""
        if not self.searched or self.budget.over():
            return []
        return [chunk for state in self.after.begin() for chunk in self.verification.look_again(state.trial)]

    def _start(self, trial: str, number: int, config: RunConfig) -> TrialStart:
        if trial in self.after.of:  # to be compared with its original, which went to its end
            return TrialStart(trial, number, config)
        return TrialStart(trial, number, config, self.rungs.asked(config), self.rungs.scored(config))

    # --- what happens

    def begun(self, trial: str, epoch: int) -> None:
        """The process that trains a trial is there, and goes on after so many epochs."""
        self.emit({"event": "begun", "trial": trial, "epoch": epoch, **self.attempts.begun(trial)})

    def saved(self, trial: str, epoch: int, data: bytes) -> None:
        """The state of a trial after an epoch arrived: a later driver, or another process, goes on from it."""
        self.states.keep(trial, epoch, data)

    def died(self, trial: str, reason: str) -> None:
        """The process that trained a trial died. Another one goes on, unless too many died before the same epoch."""
        epoch = self.attempts.furthest(trial)
        self.emit({"event": "died", "trial": trial, "epoch": epoch, "reason": reason})
        if self.attempts.died(trial):
            self.failed(trial, f"{reason}, {DEATHS} times in epoch {epoch + 1}")
            return
        if self.rungs.stopped(trial):  # it died with the answer
            self.waits(trial)
            return
        self.training.discard(trial)
        self.restart.append(self._start(trial, self.numbers[trial], self.configs[trial]))

    def epoch(
        self, trial: str, epoch: int, epochs: int, metrics: Mapping[str, float], gpus: float | None = None
    ) -> bool:
        """An epoch of a trial ended; whether the trial goes on. A new decision is recorded with all that led to it.

        ``gpus``: those of a worker, where it has any; trials that share one have a part of it.
        """
        ended = {"event": "epoch", "trial": trial, "epoch": epoch, "epochs": epochs, "metrics": dict(metrics)}
        self.hold(ended | ({} if gpus is None else {"gpus": gpus}))
        own = trial not in self.after.of
        if own and (decision := self.rungs.report(trial, self.configs[trial], epoch, metrics)) is not None:
            self.hold({"event": "rung", "epoch": epoch, **decision.to_dict()})
        self.emit()
        self.attempts.reach(trial, epoch)
        return self.rungs.stopped(trial) is None

    def trained(
        self, trial: str, networks: Mapping[str, bytes], chosen: str, epochs: int, seconds: float
    ) -> list[Chunk]:
        """Training ended: keep its networks and say what has to be verified (``Verifying.trained``)."""
        chunks = self.verification.trained(trial, self.configs[trial], networks, chosen, epochs, seconds)
        self.training.discard(trial)
        self.states.forget(trial)
        return chunks

    def verified(self, result: ChunkResult) -> list[Chunk]:
        """See ``Verifying.verified``."""
        return self.verification.verified(result)

    def given_up(self, chunk: Chunk, reason: str, labels: Sequence[int]) -> list[Chunk]:
        """See ``Verifying.given_up``."""
        return self.verification.given_up(chunk, reason, labels)

    def still_worth(self, chunk: Chunk) -> tuple[str, ...]:
        """See ``Verifying.still_worth``."""
        return self.verification.still_worth(chunk)

    def withdrawn(self, chunk: Chunk) -> list[Chunk]:
        """See ``Verifying.withdrawn``."""
        return self.verification.withdrawn(chunk)

    def refused(self, trial: str, error: str) -> None:
        """See ``Verifying.refused``."""
        self.verification.refused(trial, error)

    def lost(self, chunk: Chunk, reason: str, seconds: float) -> None:
        """See ``Verifying.lost``."""
        self.verification.lost(chunk, reason, seconds)

    def out_of_memory(self, trial: str, packing: Mapping[str, Any]) -> None:
        """A trial ran out of a GPU's memory beside others: it is queued again, and fewer share a GPU from here on."""
        self.emit({"event": "oom", "trial": trial, **packing})
        self.attempts.lacked(trial)
        self.training.discard(trial)
        self.restart.append(self._start(trial, self.numbers[trial], self.configs[trial]))

    def complete(self, trial: str, points: list[dict[str, Any]], train_seconds: float) -> dict[str, float]:
        """Every verdict of a trial is there; its metrics."""
        metrics = trial_metrics(points, train_seconds, self.space.front, self.reference)
        self.emit({"event": "completed", "trial": trial, "points": points, "metrics": metrics})
        self.verification.drop(trial)
        if trial not in self.after.of:
            self.finished += 1
            self.sampler.tell(self.numbers[trial], metrics, "completed")
        return metrics

    def waits(
        self, trial: str, epoch: int = 0, data: bytes | None = None, seconds: float | None = None
    ) -> None:  # fmt: skip
        """The training of a trial ended after so many seconds, by the decision at its rung: it waits to be promoted.

        ``data``: its state after ``epoch`` epochs, kept before anything is recorded; without it, it goes on later from
        an older one, or from its start. One that can never be promoted is stopped for good.
        """
        decision = self.rungs.waits(trial)
        if decision is None:
            self.stopped(trial, seconds=seconds)
            return
        if data is not None:
            self.states.keep(trial, epoch, data)
        known = {} if seconds is None else {"train_seconds": seconds}
        self.emit({"event": "waiting", "trial": trial, "reason": decision.reason, **known})
        self.training.discard(trial)
        self.waiting[trial] = seconds

    def failed(self, trial: str, error: str, step: int | None = None) -> None:
        """A trial ended without a result. Its name and reason are kept; it never has points."""
        self.emit({"event": "failed", "trial": trial, "error": error, "step": step})
        self._ended(trial, "failed")

    def stopped(self, trial: str, reason: str | None = None, seconds: float | None = None) -> None:
        """A trial was ended early on purpose after so many seconds; without a reason, by the decision at its rung."""
        decision = self.rungs.stopped(trial)
        why = reason or (decision.reason if decision is not None else "asked to")
        known = {} if seconds is None else {"train_seconds": seconds}
        self.emit({"event": "stopped", "trial": trial, "reason": why, **known})
        self._ended(trial, "stopped")

    def _ended(self, trial: str, status: str) -> None:
        self.training.discard(trial)
        self.waiting.pop(trial, None)
        self.states.forget(trial)
        self.verification.drop(trial)
        if trial not in self.after.of:
            self.finished += 1
            self.sampler.tell(self.numbers[trial], None, status)

    def warm(self, past: Mapping[str, Any]) -> None:
        """Take up completed trials of another study (``search.warm``), before the first trial is drawn."""
        self.emit({"event": "past", **past})
        self.sampler.warm([past_trial(row) for row in past["trials"]])
