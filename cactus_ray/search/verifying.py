"""The verification of a study's trials: what is asked of verifiers next, and what their verdicts come to.

Also on fresh samples, once the search is over (``afterwards``). Verdicts are recorded as they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cactus_ray.config import RunConfig
from cactus_ray.search.afterwards import Afterwards
from cactus_ray.search.chunks import DEAR, Chunk, ChunkResult, LevelResult, Pieces, Verification, Worth, counts
from cactus_ray.search.fresh import SPLIT as FRESH_SPLIT
from cactus_ray.search.journal import Event
from cactus_ray.search.rivals import Rivals
from cactus_ray.search.space import Space
from cactus_ray.search.store import RunStore, TrialRecord
from cactus_ray.verification.cost import cost_of_file


class Course(Protocol):
    """The study that verdicts belong to."""

    store: RunStore

    def emit(self, *events: Event) -> None: ...
    def hold(self, event: Event) -> None: ...
    def complete(self, trial: str, points: list[dict[str, Any]], train_seconds: float) -> Mapping[str, float]: ...
    def failed(self, trial: str, error: str) -> None: ...


class Verifying:
    """Trials that are verified. ``states``: of the search and replicates; those on fresh samples are in ``after``.

    ``worth``: whether dear verification of a point can matter; None where all of them are verified dearly.
    """

    def __init__(self, space: Space, pieces: Pieces, rivals: Rivals, after: Afterwards, course: Course) -> None:
        self.space, self.pieces, self.rivals, self.after, self.course = space, pieces, rivals, after, course
        self.worth: Worth | None = self._may_reach_the_front if space.search.dear == "front" else None
        self.states: dict[str, Verification] = {}
        self.earlier: dict[str, TrialRecord] = {}
        self.unasked: list[str] = []
        self.columns: dict[str, dict[str, Any]] = {}  # of every point of a trial; a hash is dear to work out

    # --- which trials

    def take_up(self, record: TrialRecord, config: RunConfig) -> bool:
        """Go on with a trial that an earlier driver had trained. False if its network is gone: it is trained again."""
        if not self._kept(record):
            self.earlier[record.id] = record
            return False
        self._begin(record, record.id, config, record.train_seconds or 0.0)
        self.unasked.append(record.id)
        return True

    def resume(self) -> list[Chunk]:
        """What is still to be verified of the trials that were taken up. To be called once."""
        unasked, self.unasked = self.unasked, []
        return [chunk for trial in unasked for chunk in self.advance(trial)]

    def trained(
        self, trial: str, config: RunConfig, networks: Mapping[str, bytes], chosen: str, epochs: int, seconds: float
    ) -> list[Chunk]:  # fmt: skip
        """Keep the networks of a trial (``last`` and ``best``), and say what has to be verified of the chosen one.

        The chosen one is ``checkpoints/TRIAL.safetensors``, another one ``checkpoints/TRIAL.best.safetensors`` or
        ``.last``.
        """
        network, store = networks[chosen], self.course.store
        for name, other in networks.items():
            if other != network:
                store.save_checkpoint(f"{trial}.{name}", other)
        path = store.save_checkpoint(trial, network)
        digest = hashlib.sha256(network).hexdigest()
        self.course.emit(
            {
                "event": "trained", "trial": trial, "epochs": epochs, "train_seconds": seconds,
                "checkpoint": path.relative_to(store.path).as_posix(), "sha256": digest,
            }
        )  # fmt: skip
        earlier = self.earlier.pop(trial, None)  # the same weights again, whose file was lost: verdicts still hold
        same = earlier if earlier is not None and earlier.sha256 == digest else None
        self._begin(same, trial, config, seconds)
        return self.advance(trial)

    def checkpoint(self, trial: str) -> Path:
        """The network of a trained trial that is verified."""
        return self.course.store.path / "checkpoints" / f"{trial}.safetensors"

    def _kept(self, trial: TrialRecord) -> bool:
        """Whether the network that the verdicts are about is still there."""
        path = self.course.store.path / (trial.checkpoint or "missing")
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == trial.sha256

    def _begin(self, record: TrialRecord | None, trial: str, config: RunConfig, seconds: float) -> None:
        """Take up a trained trial after what ``record`` knows of the same network."""
        cost = cost_of_file(self.checkpoint(trial), self.space.verification)
        self.states[trial] = Verification.of(record, trial, self.pieces, seconds, cost)
        self.columns[trial] = {
            "method": config.method, "seed": config.seed, "split": "selection", "config_hash": config.config_hash,
        }  # fmt: skip

    def drop(self, trial: str) -> None:
        """A trial has ended, as far as verification goes."""
        self.states.pop(trial, None)
        self.columns.pop(trial, None)

    # --- what verifiers say

    def verified(self, result: ChunkResult) -> list[Chunk]:
        """Verdicts of a chunk arrived; a second delivery changes nothing. Returns what has to be verified next."""
        return self._take(result.chunk, result.levels, {"ledger": result.ledger})

    def given_up(self, chunk: Chunk, reason: str, labels: Sequence[int]) -> list[Chunk]:
        """Nobody will verify a chunk: its samples are UNKNOWN for ``reason``. Returns what has to be verified next."""
        state = self.states.get(chunk.trial) or self.after.verifying.get(chunk.trial)
        if state is None:
            return []
        levels = tuple(level for level in chunk.levels if level not in state.spared)
        if not levels:
            return self.withdrawn(chunk)
        return self._take(chunk, state.undecided(replace(chunk, levels=levels), reason, labels), {"ledger": {}})

    def still_worth(self, chunk: Chunk) -> tuple[str, ...]:
        """The levels of a chunk that are to be verified as it is handed out.

        A dear one may have waited long: levels that a complete trial, or another level, has come to beat are spared.
        """
        state = self.states.get(chunk.trial)
        if state is None or chunk.stage != DEAR or self.worth is None:
            return chunk.levels
        return tuple(level for level in chunk.levels if self.worth(self._point(chunk.trial, level, state)))

    def withdrawn(self, chunk: Chunk) -> list[Chunk]:
        """No level of a chunk is worth it any more: what is known stays. Returns what has to be verified next."""
        state = self.states.get(chunk.trial)
        if state is None or state.open.pop(chunk.id, None) is None:
            return []
        return [] if state.open else self.advance(chunk.trial)

    def refused(self, trial: str, error: str) -> None:
        """The network of a trial cannot be verified at all."""
        if trial in self.states:
            self.course.failed(trial, error)
        elif trial in self.after.verifying:
            self.course.emit(self.after.seen(trial, error))

    def lost(self, chunk: Chunk, reason: str, seconds: float) -> None:
        """A verifier died or hung with a chunk, after so many seconds."""
        self.course.emit(
            {"event": "lost", "trial": chunk.trial, "chunk": chunk.id, "reason": reason, "seconds": seconds}
        )  # fmt: skip

    def advance(self, trial: str) -> list[Chunk]:
        """The next chunks of a trial of which nothing is open; without any it is complete."""
        state = self.states[trial]
        chunks = state.next_chunks(self.worth, lambda level: self._point(trial, level, state))
        if not chunks:
            self._complete(trial, state)
        return chunks

    def look_again(self, trial: str) -> list[Chunk]:
        """The next chunks of a trial on fresh samples; without any, what was found is recorded."""
        chunks = self.after.next_chunks(trial)
        if not chunks:
            self.course.emit(self.after.seen(trial))
        return chunks

    def _take(self, chunk: Chunk, levels: Mapping[str, LevelResult], more: Mapping[str, Any]) -> list[Chunk]:
        fresh = chunk.trial not in self.states
        state = self.after.verifying.get(chunk.trial) if fresh else self.states[chunk.trial]
        if state is None or chunk.id not in state.open:
            return []
        found = {
            level: {"samples": r.samples, "measures": r.measures, "seconds": r.seconds} for level, r in levels.items()
        }
        self.course.hold(
            {
                "event": "fresh" if fresh else "verdicts", "trial": chunk.trial, "chunk": chunk.id,
                "stage": chunk.stage, "split": FRESH_SPLIT if fresh else "selection", "levels": found, **more,
            }
        )  # fmt: skip
        state.take(chunk, levels)
        chunks: list[Chunk] = []
        if not state.open:
            chunks = self.look_again(chunk.trial) if fresh else self.advance(chunk.trial)
        self.course.emit()  # unless the trial's record has taken the verdicts along
        return chunks

    def _may_reach_the_front(self, point: Mapping[str, Any]) -> bool:
        """Whether dear verification of a point can matter to the front; if not, who beats it is recorded."""
        trial, level = point["trial"], point["level"]
        if trial in self.after.of:
            return self.after.worth(point)
        state = self.states[trial]
        if level in state.spared:
            return False
        rival = self.rivals.of(point, [self._point(trial, other, state) for other in self.space.levels])
        if rival is None:
            return True
        state.spared[level] = [rival["trial"], rival["level"]]
        self.course.emit({"event": "spared", "trial": trial, "levels": {level: state.spared[level]}})
        return False

    def _complete(self, trial: str, state: Verification) -> None:
        if lost := state.lost:
            self.course.failed(trial, f"no verifier survived level {lost[0]}")
            return
        points = [self._point(trial, level, state) for level in self.space.levels]
        metrics = self.course.complete(trial, points, state.train_seconds)
        if trial not in self.after.of:
            self.rivals.add(points, metrics)

    def _point(self, trial: str, level: str, state: Verification) -> dict[str, Any]:
        columns = self.columns[trial]
        return {
            "trial": trial, "level": level, "method": columns["method"], "seed": columns["seed"],
            "split": columns["split"], **counts(state.rows[level].values()), **state.measures[level],
            "train_seconds": state.train_seconds, "verify_seconds": state.seconds[level],
            "config_hash": columns["config_hash"],
        }  # fmt: skip
