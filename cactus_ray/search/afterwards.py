"""What a study does once its own trials have ended: front points on fresh samples, and replicates of front members.

The front is the search's and stays what it is; what is found out here stands beside it. A network that could not be
verified on fresh samples is not tried again, nor by a later driver: the reason is recorded, and lies in the network or
its size. What a driver that died left undone is gone on with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cactus_ray.config import RunConfig, parse
from cactus_ray.search.chunks import Chunk, Pieces, Verification, counts
from cactus_ray.search.fresh import SPLIT
from cactus_ray.search.reading import read_records
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.replicates import ENDED, Replicate, due, fields, leading, replicate_seed
from cactus_ray.search.space import Space
from cactus_ray.search.store import RunStore
from cactus_ray.verification.cost import cost_of_file

Event = dict[str, Any]
logger = logging.getLogger(__name__)


class Afterwards:
    """The state of it. ``pieces``: how fresh samples are cut; without samples nothing is verified again.

    ``of``: replicate -> the trial that it repeats; ``verifying``: trials of which fresh verdicts are asked for. The
    records decide what is to be done, read when the search has ended and at the end of every round of seeds.
    """

    def __init__(self, space: Space, store: RunStore, records: Records, pieces: Pieces) -> None:
        self.space, self.store, self.pieces = space, store, pieces
        self.of = {t.id: t.of for t in records.replicates() if t.of is not None}
        self.open = {t.id for t in records.replicates() if t.status not in ENDED}
        self.spared = {t.id: set(t.spared) for t in records.drawn()}
        self.verifying: dict[str, Verification] = {}
        self.points: dict[str, dict[str, dict[str, Any]]] = {}
        self.wanted: dict[str, tuple[str, ...]] | None = None
        self.queue: list[Replicate] | None = None
        self.originals: dict[str, TrialRecord] = {}

    def event(self, event: Event) -> Event:
        """Follow the study; an event of a replicate says whom it repeats."""
        kind, trial = event["event"], event.get("trial", "")
        if kind == "started" and "of" in event:
            self.of[trial] = event["of"]
            self.open.add(trial)
        if kind == "spared":
            self.spared.setdefault(trial, set()).update(event["levels"])
        if kind in ENDED:
            self.open.discard(trial)
            self.queue = self.queue or None  # after the last of a round the records say what is next
            self.wanted = self.wanted if trial in self.of else None  # a trial of the search may change the front
        return {**event, "of": self.of[trial]} if trial in self.of else event

    # --- fresh samples

    def begin(self) -> list[Verification]:
        """Trials that are to be verified on fresh samples now, with what is known of them; each once."""
        wanted = self._unseen()
        if not wanted:
            return []
        self.wanted = {}
        records = read_records(self.store.path, verdicts=False)
        return [self._begun(records.trials[trial], levels) for trial, levels in wanted.items()]

    def _unseen(self) -> dict[str, tuple[str, ...]]:
        """Levels on a front that were not verified on fresh samples yet, by trial; only where the network is left."""
        if self.wanted is None and self.pieces.samples:
            records = read_records(self.store.path, verdicts=False)
            ahead = [
                key
                for points in fields(records, self.space.front, self.space.constraints)
                for key in leading(points, self.space.front)
            ]
            self.wanted = {}
            for trial in dict.fromkeys(trial for trial, _ in ahead):
                record = records.trials[trial]
                again = record.again
                seen = set() if again is None else {point["level"] for point in again.points} | set(again.refused)
                levels = tuple(v for v in self.space.levels if (trial, v) in ahead and v not in seen)
                if levels and trial not in self.verifying and self._kept(record):
                    self.wanted[trial] = levels
        return self.wanted or {}

    def _kept(self, trial: TrialRecord) -> bool:
        path = self.store.path / (trial.checkpoint or "missing")
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == trial.sha256:
            return True
        logger.warning("%s: its network is gone, so its points are not verified on fresh samples", trial.id)
        return False

    def _begun(self, trial: TrialRecord, wanted: tuple[str, ...]) -> Verification:
        cost = cost_of_file(self.store.path / str(trial.checkpoint), self.space.verification)
        pieces = replace(self.pieces, levels=wanted)
        state = Verification.of(trial.again, trial.id, pieces, trial.train_seconds or 0.0, cost)
        self.points[trial.id] = {point["level"]: point for point in trial.points if point["level"] in wanted}
        self.verifying[trial.id] = state
        return state

    def seen(self, trial: str, error: str | None = None) -> Event:
        """All that there will be of a trial on fresh samples, as its event; with ``error`` no level has any points."""
        state, points = self.verifying.pop(trial), self.points.pop(trial)
        why = error or (f"no verifier survived level {state.lost[0]}" if state.lost else None)
        if why:
            return {"event": "reevaluated", "trial": trial, "points": [], "error": why, "levels": list(points)}
        rows = [
            {
                **points[level],
                "split": SPLIT,
                **counts(state.rows[level].values()),
                "verify_seconds": state.seconds[level],
            }
            for level in points
            if level in state.rows
        ]
        return {"event": "reevaluated", "trial": trial, "points": rows}

    def next_chunks(self, trial: str) -> list[Chunk]:
        return self.verifying[trial].next_chunks()

    # --- replicates

    def settled(self) -> bool:
        """Whether nothing is left to do, of which the records are asked at most once between two ends of trials."""
        return not self.verifying and not self.open and not self._unseen() and not self._due()

    def next(self) -> Replicate | None:
        """The next replicate to start; None while none is due."""
        found = self._due()
        return found.pop(0) if found else None

    def _due(self) -> list[Replicate]:
        if self.space.search.seeds < 2:
            return []
        if self.queue is None and not self.open:
            records = read_records(self.store.path, verdicts=False)
            self.queue = due(records, self.space.front, self.space.constraints, self.space.search.seeds)
            self.originals = {r.of: records.trials[r.of] for r in self.queue}
        return self.queue or []

    def started(
        self, wanted: Replicate, number: int, epoch_cost: Callable[[RunConfig], float]
    ) -> tuple[Event, RunConfig]:
        """A replicate's first event, and its configuration: that of its original with another seed."""
        original = self.originals[wanted.of]
        config = parse(RunConfig, original.config)
        config = replace(config, seed=replicate_seed(config.seed, wanted.number))
        return {
            "event": "started", "trial": wanted.id, "number": number, "parameters": original.parameters,
            "origin": "replicate", "of": wanted.of, "replicate": wanted.number, "config": config.to_dict(),
            "config_hash": config.config_hash, "seed": config.seed, "epoch_cost": epoch_cost(config),
        }, config  # fmt: skip

    def worth(self, point: Mapping[str, Any]) -> bool:
        """Whether a point of a replicate is verified dearly: where its original was, so that they can be compared."""
        return point["level"] not in self.spared.get(self.of[point["trial"]], ())

    def own(self, trials: Iterable[str]) -> list[str]:
        """Those that are trials of the search itself."""
        return [trial for trial in trials if trial not in self.of]
