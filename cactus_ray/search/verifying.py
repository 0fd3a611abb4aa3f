"""The verification of a study's trials: what is asked of verifiers next, and what their verdicts come to.

Also on fresh samples, once the search is over (``afterwards``). Verdicts are recorded as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cactus_ray.config import RunConfig
from cactus_ray.search.afterwards import Afterwards
from cactus_ray.search.chunks import DEAR, Chunk, ChunkResult, LevelResult, Pieces, Verification, Worth, counts
from cactus_ray.search.fresh import SPLIT as FRESH_SPLIT
from cactus_ray.search.rivals import Rivals
from cactus_ray.search.space import Space

Event = dict[str, Any]


class Course(Protocol):
    """The study that verdicts belong to."""

    def emit(self, event: Event) -> None: ...
    def complete(self, trial: str, points: list[dict[str, Any]], train_seconds: float) -> None: ...
    def failed(self, trial: str, error: str) -> None: ...


class Verifying:
    """Trials that are verified. ``states``: of the search and replicates; those on fresh samples are in ``after``.

    ``worth``: whether dear verification of a point can matter; None where all of them are verified dearly.
    """

    def __init__(self, space: Space, pieces: Pieces, rivals: Rivals, after: Afterwards, course: Course) -> None:
        self.space, self.pieces, self.rivals, self.after, self.course = space, pieces, rivals, after, course
        self.worth: Worth | None = self._may_reach_the_front if space.search.dear == "front" else None
        self.states: dict[str, Verification] = {}
        self.columns: dict[str, dict[str, Any]] = {}  # of every point of a trial; a hash is dear to work out

    def take_up(self, state: Verification, config: RunConfig) -> None:
        """A trial is trained; ``advance`` says what is to be verified of it."""
        self.states[state.trial] = state
        self.columns[state.trial] = {
            "method": config.method, "seed": config.seed, "split": "selection", "config_hash": config.config_hash,
        }  # fmt: skip

    def drop(self, trial: str) -> None:
        """A trial has ended, as far as verification goes."""
        self.states.pop(trial, None)
        self.columns.pop(trial, None)

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
        self.course.emit(
            {
                "event": "fresh" if fresh else "verdicts", "trial": chunk.trial, "chunk": chunk.id,
                "stage": chunk.stage, "split": FRESH_SPLIT if fresh else "selection", "levels": found, **more,
            }
        )  # fmt: skip
        state.take(chunk, levels)
        if state.open:
            return []
        return self.look_again(chunk.trial) if fresh else self.advance(chunk.trial)

    def _may_reach_the_front(self, point: Mapping[str, Any]) -> bool:
        """Whether dear verification of a point can matter to the front; if not, who beats it is recorded."""
        trial, level = point["trial"], point["level"]
        if trial in self.after.of:
            return self.after.worth(point)
        state = self.states[trial]
        if level in state.spared:
            return False
        if any(c.metric == f"certified_accuracy@{level}" for c in self.space.constraints):
            return True  # a lower end would decide whether the trial is feasible
        siblings = [self._point(trial, other, state) for other in self.space.levels if other != level]
        rival = self.rivals.of(point, siblings)
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
        self.course.complete(trial, points, state.train_seconds)
        if trial not in self.after.of:
            self.rivals.add(points)

    def _point(self, trial: str, level: str, state: Verification) -> dict[str, Any]:
        columns = self.columns[trial]
        return {
            "trial": trial, "level": level, "method": columns["method"], "seed": columns["seed"],
            "split": columns["split"], **counts(state.rows[level].values()), **state.measures[level],
            "train_seconds": state.train_seconds, "verify_seconds": state.seconds[level],
            "config_hash": columns["config_hash"],
        }  # fmt: skip
