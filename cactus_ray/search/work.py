"""How long trials trained, followed from the events of a run alone.

What is counted is work, whatever became of it. An epoch that was trained again counts again; what a process or a driver
that died took along counts by the clock, from the last sign of its training to its end. The end of a driver that was
killed is its last event: while it works it writes one every ``ALIVE_SECONDS`` at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ALIVE_SECONDS = 30.0
_ENDS = ("trained", "stopped", "waiting")
_BREAKS = ("failed", "died", "oom")


class Work:
    """Follows the events of a run, in their order and through all its drivers."""

    def __init__(self) -> None:
        self.open: dict[str, float] = {}  # trials that train -> when that was last heard of
        self.last: float | None = None

    def event(self, event: Mapping[str, Any]) -> dict[str, float]:
        """Take up one event; returns the seconds of training, by trial, that it tells of."""
        kind, trial, now = event["event"], str(event.get("trial")), _number(event.get("time"))
        found: dict[str, float] = {}
        if kind in ("study", "driver"):
            found = self._lost(self.last)
        elif kind == "finished":
            found = self._lost(now)
        elif kind in ("begun", *_BREAKS):  # one that trained already was begun anew: its last epoch was cut off
            before = self.open.pop(trial, None)
            if before is not None and now is not None:
                found = {trial: max(now - before, 0.0)}
        elif kind in _ENDS:
            self.open.pop(trial, None)
        elif kind == "epoch":
            found = {trial: _number(event.get("metrics", {}).get("seconds")) or 0.0}
        if kind in ("begun", "epoch") and now is not None:
            self.open[trial] = now
        self.last = self.last if now is None else now
        return found

    def _lost(self, end: float | None) -> dict[str, float]:
        """What was under way when its driver ended."""
        cut, self.open = self.open, {}
        return {} if end is None else {trial: max(end - since, 0.0) for trial, since in cut.items()}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
