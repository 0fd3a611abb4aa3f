"""The journal of a study: every event is on disk before anything else happens, then budget and listeners hear of it.

What is not recorded has not happened. Events that belong together are written, and waited for, at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cactus_ray.search.afterwards import Afterwards
from cactus_ray.search.budget import Budget
from cactus_ray.search.store import Records, RunStore
from cactus_ray.search.work import ALIVE_SECONDS

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Journal:
    """Writes the events of one study, those of the study and its drivers themselves among them.

    ``reference``: the reference point of the hypervolume, fixed with the first event.
    """

    def __init__(
        self, store: RunStore, records: Records, budget: Budget, after: Afterwards, listeners: Sequence[Listener] = ()
    ) -> None:
        self.store, self.budget, self.after, self.listeners = store, budget, after, list(listeners)
        self.reference: dict[str, float] = dict(records.study.get("reference_point", {}))
        self.said = time.monotonic()
        self.held: list[Event] = []

    def emit(self, *events: Event) -> None:
        """Write what was held back, then these events, and tell them in this order; nothing where there is none.

        Where one of these events is refused, what was held back is written with the next ones.
        """
        whole = [{**self.after.event(event), "time": time.time()} for event in (*self.held, *events)]
        if not whole:
            return
        self.store.append(*whole)
        self.held = []
        self.said = time.monotonic()
        for event in whole:
            self.budget.event(event)
            for listener in self.listeners:
                listener(event)

    def hold(self, event: Event) -> None:
        """Write and tell an event with the next one, which is to follow without delay; ``emit()`` if none does."""
        self.held.append(event)

    def begin(self, study: Mapping[str, Any], reference: Mapping[str, float]) -> None:
        """Write the first event of a new study; the reference point of the hypervolume is fixed from here on."""
        self.reference = dict(reference)
        self.emit({"event": "study", "schema": 1, **study, "reference_point": self.reference})

    def work(self) -> None:
        """Write that a driver begins to work: time until the next event of an earlier one was no work."""
        self.emit({"event": "driver"})

    def alive(self) -> None:
        """Write that the driver works, where nothing else was written for long: so it is known when it was killed."""
        if time.monotonic() - self.said >= ALIVE_SECONDS:
            self.emit({"event": "alive"})

    def packed(self, packing: Mapping[str, Any]) -> None:
        """Write how many trials share a GPU, and why."""
        self.emit({"event": "packing", **packing})

    def end(self, status: str, seconds: float) -> None:
        """Write how the driver ended: completed, limit, interrupted or failed; and the limit that was reached."""
        reason = self.budget.enough()
        self.emit({"event": "finished", "status": status, "seconds": seconds} | ({"reason": reason} if reason else {}))
