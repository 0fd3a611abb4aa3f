"""The tables and the kept networks of a run, brought up to date event by event.

An event costs the same in a study of ten trials and of ten thousand: the front is kept and not worked out anew, a row
of ``points.csv`` is put into text once, and a thread of its own writes the files, every few seconds.
"""

from __future__ import annotations

import csv
import io
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cactus_ray.search.checkpoints import Leaders, delete_networks, prune_checkpoints
from cactus_ray.search.pareto import Front
from cactus_ray.search.space import Space
from cactus_ray.search.store import COLUMNS, Records, RunStore, write_whole

WRITE_SECONDS = 5.0
"""How long the tables of a search that runs may lag behind ``trials.jsonl``."""
BUSY_SHARE = 0.02
"""The share of the time that may go into writing them; a long study's tables lag further behind."""

Event = Mapping[str, Any]
logger = logging.getLogger(__name__)


class Table:
    """All points of a study, from which ``points.csv`` and ``front.csv`` can be written at any time.

    The texts are those of ``store.write_tables`` on the records: trials in the order in which they started. ``front``:
    of all points; whoever has it keeps it up to date.
    """

    def __init__(self, front: Front, records: Records) -> None:
        self.front = front
        self.columns = list(COLUMNS)
        self.points: dict[str, list[dict[str, Any]]] = {trial.id: [] for trial in records.drawn()}
        self.texts: dict[int, tuple[str, str]] = {}  # of a point, by its id: what is before and after ``on_front``
        for trial in records.drawn():
            if trial.status == "completed":
                self.complete(trial.id, trial.points)

    def start(self, trial: str) -> None:
        """A trial started; its points will stand at this place."""
        self.points.setdefault(trial, [])

    def complete(self, trial: str, points: Sequence[dict[str, Any]]) -> None:
        """A trial is complete."""
        self.points[trial] = list(points)
        more = [c for c in dict.fromkeys(c for p in points for c in p) if c not in self.columns]
        self.columns += more
        again = (p for known in self.points.values() for p in known) if more else points
        self.texts |= {id(point): self._text(point) for point in again}

    def _text(self, point: Mapping[str, Any]) -> tuple[str, str]:
        place = self.columns.index("on_front")
        return _row(point, self.columns[:place]), _row(point, self.columns[place + 1 :])

    def snapshot(self) -> tuple[str, list[tuple[str, str]], set[int]]:
        """The heading, the texts of all points, and the numbers of those that are on the front."""
        rows = [point for points in self.points.values() for point in points]
        leading = {id(point) for point in self.front.points}
        on_front = {number for number, point in enumerate(rows) if id(point) in leading}
        return ",".join(self.columns), [self.texts[id(point)] for point in rows], on_front


def _row(point: Mapping[str, Any], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([point.get(column, "") for column in columns])
    return text.getvalue()


class Upkeep:
    """A listener of a study that keeps ``points.csv``, ``front.csv`` and ``checkpoints/`` of its run up to date.

    A network is deleted as soon as its trial has ended without, or has lost, its last place on the front
    (``search.keep``). Tables are written inside ``with upkeep.writing():``, and lag behind.
    """

    def __init__(self, space: Space, store: RunStore, records: Records) -> None:
        self.store, self.keep = store, space.search.keep
        self.leaders = Leaders(space.front, space.constraints)
        self.table = Table(self.leaders.all, records)
        for trial in records.drawn():
            if trial.status == "completed":
                self.leaders.add(trial.id, trial.points, trial.metrics)
        if self.keep == "front":  # what a killed driver left behind
            prune_checkpoints(store.path, records, space.front, space.constraints)
        self.lock = threading.Lock()
        self.changed = threading.Event()
        self.closing = threading.Event()

    def event(self, event: Event) -> None:
        """Take up one event of the study."""
        kind = event["event"]
        if "of" in event:  # a replicate: no candidate, so its network goes when it has ended
            if kind in ("completed", "failed", "stopped"):
                self._delete([event["trial"]])
        elif kind == "started":
            with self.lock:
                self.table.start(event["trial"])
        elif kind == "completed":
            with self.lock:
                self.table.complete(event["trial"], event["points"])
                behind = self.leaders.add(event["trial"], event["points"], event["metrics"])
            self.changed.set()
            self._delete(behind)
        elif kind in ("failed", "stopped"):
            self._delete([event["trial"]])

    def _delete(self, trials: Sequence[str]) -> None:
        if self.keep == "front":
            for trial in trials:
                delete_networks(self.store.path, trial)

    def write(self) -> None:
        """Write both tables as of now; each file is replaced as a whole."""
        with self.lock:
            heading, texts, on_front = self.table.snapshot()
        lines = [f"{before},{number in on_front},{after}\n" for number, (before, after) in enumerate(texts)]
        leading = [lines[number] for number in sorted(on_front)]
        for name, rows in (("points.csv", lines), ("front.csv", leading)):
            write_whole(self.store.path / name, "".join([f"{heading}\n", *rows]).encode())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write the tables in a thread while the block runs, where they changed; not at its end."""
        thread = threading.Thread(target=self._write_on, name="tables", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.closing.set()
            self.changed.set()
            thread.join()

    def _write_on(self) -> None:
        wait = 0.0
        while not self.closing.wait(wait):
            self.changed.wait()
            if self.closing.is_set():
                return
            self.changed.clear()
            begin = time.monotonic()
            try:
                self.write()
            except OSError as error:  # a full disk shows in the records, too; the next time may be better
                logger.warning("%s: tables not written: %s", self.store.path, error)
            wait = max(WRITE_SECONDS, (time.monotonic() - begin) / BUSY_SHARE)
