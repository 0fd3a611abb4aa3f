"""The folder of a run: records that are appended and never changed, and tables that are rebuilt from them.

``trials.jsonl`` holds one JSON object per line, appended by one driver with flush and fsync. A line that a killed
driver tore stays as it is, and the next one is never glued to it.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from cactus_ray.errors import UserError
from cactus_ray.search.events import EVENTS
from cactus_ray.search.faults import fault_of, fault_of_points
from cactus_ray.search.pareto import non_dominated
from cactus_ray.search.reading import read_records
from cactus_ray.search.records import COLUMNS, Records, TrialRecord
from cactus_ray.search.replicates import seen_again

__all__ = [
    "COLUMNS",
    "Records",
    "RunStore",
    "TrialRecord",
    "append_line",
    "read_records",
    "temporary",
    "with_front",
    "write_tables",
    "write_whole",
]


class RunStore:
    """The folder of a run, for its one driver. Nothing is ever removed from ``trials.jsonl``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = self.path / "trials.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this driver; UserError if another one has it. A dead driver's lock is free by itself."""
        lock = filelock.FileLock(self.path / ".driver.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.path}: in use by another driver; wait until it ends, stop it, or choose another --name"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def append(self, *events: Mapping[str, Any]) -> None:
        """Write events, in one go; all are on disk when this returns.

        Non-finite numbers become null in ``epoch``, ``verdicts`` and ``fresh`` events; anywhere else, and in points
        that are incomplete or contradict themselves, they raise ValueError and nothing is written.
        """
        _append(self.file, b"".join(map(_event_line, events)))

    def save_checkpoint(self, trial: str, network: bytes) -> Path:
        """Keep a network as ``checkpoints/TRIAL.safetensors``; the file is whole or not there."""
        path = self.path / "checkpoints" / f"{trial}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, network)
        return path


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line; it is on disk when this returns, and never glued to a line that a killed writer tore.

    Raises ValueError for a number that is not finite.
    """
    _append(path, _line(row))


def _append(path: Path, lines: bytes) -> None:
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _event_line(event: Mapping[str, Any]) -> bytes:
    kind = event.get("event")
    if kind not in EVENTS:
        raise ValueError(f"event {kind!r}; expected one of {', '.join(EVENTS)}")
    if kind == "completed" and (fault := fault_of(event)):
        raise ValueError(f"points of trial {event.get('trial')} are refused: {fault}")
    if kind == "reevaluated" and (fault := fault_of_points(event)):
        raise ValueError(f"points of trial {event.get('trial')} on fresh samples are refused: {fault}")
    try:
        return _line(event)
    except ValueError:  # hardly ever, so that not every one of many numbers is looked at
        if kind not in ("epoch", "verdicts", "fresh"):
            raise
        return _line(_without_non_finite(event))


def _line(row: Mapping[str, Any]) -> bytes:
    # there are no circles, and to look for them takes a fifth of the time where rows are many and small
    return json.dumps(row, allow_nan=False, check_circular=False, separators=(",", ":")).encode() + b"\n"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file anew; it is whole and on disk when this returns, and never half there."""
    half = temporary(path)
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def temporary(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.tmp")


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(v) for key, v in value.items()}
    return [_without_non_finite(v) for v in value] if isinstance(value, list | tuple) else value


# --- tables --------------------------------------------------------------------------------------------------------


def with_front(records: Records, front: Mapping[str, str]) -> list[dict[str, Any]]:
    """The points of the completed trials, each with ``on_front``."""
    points = records.points()
    return [{**p, "on_front": on} for p, on in zip(points, non_dominated(points, front), strict=True)]


def write_tables(run: str | Path, records: Records, front: Mapping[str, str]) -> None:
    """Write ``points.csv`` and ``front.csv`` anew from the records; each file is replaced as a whole.

    What replicates and fresh samples add (``replicates.seen_again``) are columns of their own, empty where there is
    none; the points of replicates are rows of ``replicates.csv``, a file that exists once there is one. Numbers are
    written so that they read back as the same float.
    """
    points = seen_again(records, with_front(records, front), front)
    extra = dict.fromkeys(column for p in points for column in p if column not in COLUMNS)
    columns = [*COLUMNS, *extra]
    _write_csv(Path(run) / "points.csv", columns, points)
    _write_csv(Path(run) / "front.csv", columns, [p for p in points if p["on_front"]])
    rows = ((t, p) for t in records.replicates() for p in t.points)
    if others := [{"of": t.of, **{c: p[c] for c in COLUMNS if c in p}, "on_front": False} for t, p in rows]:
        _write_csv(Path(run) / "replicates.csv", ["of", *COLUMNS], others)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    half = temporary(path)
    with half.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    half.replace(path)
