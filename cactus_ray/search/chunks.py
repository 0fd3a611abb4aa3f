"""What has to be verified of one trial, in which pieces, and what is known so far.

A trial is verified in two stages. ``cheap`` (attacks, IBP, CROWN) sees every sample at every level; ``dear`` (slopes,
branch and bound) sees what the cheap stage left open. What is open is worked out from verdicts and not from chunks, so
a driver that takes over from records asks for the rest, whatever pieces the first one had cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cactus_ray.search.records import TrialRecord
from cactus_ray.verification.cost import UNKNOWN, Cost

CHEAP, DEAR = "cheap", "dear"
DEAR_BOUNDS = ("alpha", "branch")
Row = list[Any]
Worth = Callable[[Mapping[str, Any]], bool]
"""Whether dear verification of a point (a row of ``points.csv`` after the cheap stage) can matter."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The same samples of one trial's network at several levels, verified together by one verifier.

    ``id`` is the key of their results. ``spent``: most seconds that the cheap stage took for one of them at a level.
    ``cost``: multiply-adds that they are estimated to take, but for branch and bound; 0: not known.
    """

    id: str
    trial: str
    stage: str
    levels: tuple[str, ...]
    indices: tuple[int, ...]
    spent: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class LevelResult:
    """What a verifier found at one level: one compact row per sample, and the measures of the level's network.

    ``samples``: [index, label, verdict, correct, lower_bound, decided_by, seconds]; ``measures``: bytes, ideal_bits,
    macs, or nothing where no verifier survived the chunk.
    """

    samples: list[Row]
    measures: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The results of a chunk by level. ``ledger``: seconds of the verifier by stage, ``overhead`` among them."""

    chunk: Chunk
    levels: dict[str, LevelResult]
    ledger: dict[str, float]

    @property
    def seconds(self) -> float:
        """All seconds that the verifier worked."""
        return sum(self.ledger.values())


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a trial's samples are cut. ``dear``: whether the settings ask for a dear stage; ``most``: estimated
    multiply-adds of a chunk of more than one sample."""

    levels: tuple[str, ...]
    samples: tuple[int, ...]
    cheap_samples: int
    dear_samples: int
    dear: bool
    most: float = math.inf


@dataclass(slots=True)
class Verification:
    """The verification of one trained trial.

    ``cost``: of its network, per sample and level;
    ``open``: chunks that are asked for and not answered, by id; ``spared``: level -> [trial, level] of the point that
    beats all that dear verification could bring.
    """

    trial: str
    pieces: Pieces
    train_seconds: float
    cost: Cost = UNKNOWN
    rows: dict[str, dict[int, Row]] = field(default_factory=dict)
    dear: dict[str, set[int]] = field(default_factory=dict)
    measures: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    open: dict[str, Chunk] = field(default_factory=dict)
    spared: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(
        record: TrialRecord | None, trial: str, pieces: Pieces, train_seconds: float, cost: Cost = UNKNOWN
    ) -> Verification:
        """The state after what ``record`` knows of the same network; nothing is known without one."""
        state = Verification(trial, pieces, train_seconds, cost)
        if record is not None:
            state.rows = {level: dict(rows) for level, rows in record.verdicts.items()}
            state.dear = {level: set(indices) for level, indices in record.dear.items()}
            state.measures = {level: dict(measures) for level, measures in record.measures.items()}
            state.seconds = dict(record.verify_seconds)
            state.spared = dict(record.spared)
        return state

    def next_chunks(
        self, worth: Worth | None = None, point: Callable[[str], dict[str, Any]] | None = None
    ) -> list[Chunk]:
        """What to ask for now that nothing is open: the cheap chunks that are missing, else the dear ones, else none.

        ``worth`` is asked once per level, with the level's ``point``; without it every point is worth it.
        """
        every = set(self.pieces.samples)
        missing = {level: every - self.rows.get(level, {}).keys() for level in self.pieces.levels}
        chunks = self._cut(CHEAP, missing, self.pieces.cheap_samples)
        if not chunks and self.pieces.dear and not self.lost:
            left = {level: self._left(level) for level in self.pieces.levels}
            if worth is not None and point is not None:
                left = {level: indices for level, indices in left.items() if indices and worth(point(level))}
            chunks = self._cut(DEAR, left, self.pieces.dear_samples)
        self.open = {chunk.id: chunk for chunk in chunks}
        return chunks

    @property
    def lost(self) -> list[str]:
        """Levels of which no verifier survived a chunk, once every sample has a row."""
        return [level for level in self.pieces.levels if level not in self.measures]

    def _left(self, level: str) -> set[int]:
        """Samples that bounds left undecided and that no dear stage has seen."""
        rows, seen = self.rows.get(level, {}), self.dear.get(level, set())
        return {i for i, row in rows.items() if row[2] == "UNKNOWN" and row[5] == "bounds" and i not in seen}

    def _cut(self, stage: str, wanted: Mapping[str, set[int]], size: int) -> list[Chunk]:
        """Chunks of at most ``size`` samples that are wanted at the same levels; fewer where they are dear."""
        if not any(wanted.values()):
            return []
        groups: dict[tuple[str, ...], list[int]] = {}
        for index in self.pieces.samples:
            levels = tuple(level for level in self.pieces.levels if index in wanted.get(level, ()))
            if levels:
                groups.setdefault(levels, []).append(index)
        return [
            self._chunk(stage, levels, indices[i : i + step])
            for levels, indices in groups.items()
            for step in [self._samples_of(stage, levels, size)]
            for i in range(0, len(indices), step)
        ]

    def _samples_of(self, stage: str, levels: Sequence[str], size: int) -> int:
        """How many samples, ``size`` at most and one at least, cost no more than a chunk may."""
        each = self.cost.of(stage == DEAR) * len(levels)
        return size if each * size <= self.pieces.most else max(int(self.pieces.most / each), 1)

    def _chunk(self, stage: str, levels: tuple[str, ...], indices: Sequence[int]) -> Chunk:
        places = ",".join(str(self.pieces.levels.index(level)) for level in levels)
        known = [self.rows[level][i][6] for level in levels for i in indices] if stage == DEAR else []
        spent = max((float(s or 0.0) for s in known), default=0.0)
        name = f"{self.trial}/{stage}/{places}/{indices[0]}-{indices[-1]}"
        cost = self.cost.of(stage == DEAR) * len(levels) * len(indices)
        return Chunk(name, self.trial, stage, levels, tuple(indices), spent, cost)

    def take(self, chunk: Chunk, levels: Mapping[str, LevelResult]) -> None:
        """Verdicts of a chunk; those of the dear stage replace those of the cheap one."""
        del self.open[chunk.id]
        for level, found in levels.items():
            self.rows.setdefault(level, {}).update({row[0]: row for row in found.samples})
            if chunk.stage == DEAR:
                self.dear.setdefault(level, set()).update(chunk.indices)
            if found.measures:
                self.measures[level] = dict(found.measures)
            self.seconds[level] = self.seconds.get(level, 0.0) + found.seconds

    def undecided(self, chunk: Chunk, reason: str, labels: Iterable[int]) -> dict[str, LevelResult]:
        """What is said of a chunk that nobody verified: UNKNOWN for ``reason``; what was known before stays known."""
        results = {}
        for level in chunk.levels:
            rows, known = [], self.rows.get(level, {})
            for index, label in zip(chunk.indices, labels, strict=True):
                row = list(known.get(index, [index, label, "UNKNOWN", False, None, reason, 0.0]))
                row[5] = reason
                rows.append(row)
            results[level] = LevelResult(rows, {}, 0.0)
        return results


def counts(rows: Iterable[Row]) -> dict[str, Any]:
    """Columns of ``points.csv`` that verdicts decide."""
    all_rows = list(rows)
    total, verdicts = len(all_rows), [row[2] for row in all_rows]
    certified, correct = verdicts.count("CERTIFIED"), [row[3] for row in all_rows].count(True)
    return {
        "samples": total, "standard_accuracy": correct / total, "n_certified": certified,
        "n_falsified": verdicts.count("FALSIFIED"), "n_unknown": verdicts.count("UNKNOWN"),
        "certified_accuracy": certified / total,
    }  # fmt: skip
