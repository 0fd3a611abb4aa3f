"""A live view of a study in the terminal, or plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cactus_ray.report.figures import duration_text, size_text
from cactus_ray.report.tables import packing_text, parameters_text
from cactus_ray.search.pareto import Front
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records

LINE_SECONDS = 10.0
_SHORT = {"loss": "loss", "standard_accuracy": "standard", "ibp_certified_accuracy": "IBP certified"}


@dataclass(slots=True)
class _Trial:
    """A trial that is under way."""

    epoch: int = 0
    epochs: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    verified: int = 0
    dear: int = 0
    said: float = 0.0


class StudyProgress:
    """Shows trials, epochs, losses, verdicts, the best so far and the time left. Use as a context manager.

    ``event`` takes the events of ``trials.jsonl`` and may be called from any thread. Trials that ended stay as lines;
    on a terminal the state is redrawn below them, elsewhere epochs are lines too, at most one per trial in
    ``LINE_SECONDS``. Writes to standard error. ``enabled=False`` shows nothing.
    """

    def __init__(self, space: Space, records: Records, *, enabled: bool = True, console: Console | None = None) -> None:
        self.space, self.enabled = space, enabled
        self.console = console or Console(stderr=True, markup=False, emoji=False)
        self.lock = threading.RLock()
        self.ended = sum(t.status in ("completed", "failed", "stopped") for t in records.drawn())
        points = records.points()
        self.leading = Front(space.front, points)
        self.samples: int | None = points[0]["samples"] if points else None
        self.open: dict[str, _Trial] = {}
        self.waiting = {trial.id for trial in records.drawn() if trial.status == "waiting"}
        for trial in records.trials.values():
            if trial.status == "trained":
                verified = sum(len(rows) for rows in trial.verdicts.values())
                dear = sum(len(indices) for indices in trial.dear.values())
                self.open[trial.id] = _Trial(trained=True, verified=verified, dear=dear)
        self.ended_before, self.begun = self.ended + len(self.waiting), time.monotonic()
        live = enabled and self.console.is_terminal
        self.live = (
            Live(get_renderable=self._view, console=self.console, refresh_per_second=4, transient=True)
            if live
            else None
        )

    def __enter__(self) -> StudyProgress:
        self.begun = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take up one event."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if self.enabled and handler is not None:
            with self.lock:
                handler(event)

    def say(self, line: str) -> None:
        """Show a line; from any thread."""
        if self.enabled:
            with self.lock:
                self._say(line)

    # --- events

    def _on_study(self, event: Mapping[str, Any]) -> None:
        space = self.space
        self._say(f"study {space.name}: {space.search.trials} trials, {len(space.levels)} levels each")

    def _on_started(self, event: Mapping[str, Any]) -> None:
        self.open[event["trial"]] = _Trial()
        if not self.live:
            what = parameters_text(event["parameters"])
            what = f"seed {event['replicate']} of {event['of']}" if "of" in event else what
            self._say(f"{event['trial']} started: {what}")
        if event.get("note"):
            self._say(f"{event['trial']} is {event['note']}")

    def _on_past(self, event: Mapping[str, Any]) -> None:
        self._say(f"{len(event['trials'])} past trials taken from {event['source']}, {len(event['skipped'])} left out")
        for note in event["notes"]:
            self._say(f"  {note}")
        for row in event["skipped"]:
            self._say(f"  left out {row['trial']}: {row['why']}")

    def _on_packing(self, event: Mapping[str, Any]) -> None:
        self._say(packing_text(event))

    def _on_oom(self, event: Mapping[str, Any]) -> None:
        self.open.pop(event["trial"], None)
        self._say(f"{event['trial']} {packing_text(event)}")

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        trial = self.open.setdefault(event["trial"], _Trial())
        trial.epoch, trial.epochs, trial.metrics = event["epoch"], event["epochs"], dict(event["metrics"])
        if not self.live and time.monotonic() - trial.said >= LINE_SECONDS:
            trial.said = time.monotonic()
            self._say(f"{event['trial']} epoch {trial.epoch}/{trial.epochs}: {_metrics(trial.metrics)}")

    def _on_begun(self, event: Mapping[str, Any]) -> None:
        if event["epoch"]:
            self._say(f"{event['trial']} goes on after epoch {event['epoch']}")

    def _on_died(self, event: Mapping[str, Any]) -> None:
        self._say(f"{event['trial']}: {event['reason']} after epoch {event['epoch']}")

    def _on_trained(self, event: Mapping[str, Any]) -> None:
        self.open.setdefault(event["trial"], _Trial()).trained = True
        if not self.live:
            self._say(f"{event['trial']} trained in {duration_text(event['train_seconds'])}; verification begins")

    def _on_verdicts(self, event: Mapping[str, Any]) -> None:
        trial = self.open.setdefault(event["trial"], _Trial(trained=True))
        count = sum(len(found["samples"]) for found in event["levels"].values())
        if event["stage"] == "dear":  # these had a verdict before
            trial.dear += count
        else:
            trial.verified += count

    def _on_completed(self, event: Mapping[str, Any]) -> None:
        if "of" in event:
            self._end(event, f"complete: a replicate of {event['of']}")
            return
        self.leading.add(event["points"])
        self.samples = event["points"][0]["samples"]
        own = [p for p in self.leading.points if p["trial"] == event["trial"]]
        best = max(event["points"], key=lambda p: p["certified_accuracy"])
        share = f"{len(own)} of {len(event['points'])} points on the front"
        what = f"{best['certified_accuracy']:.1%} certified ({best['level']}, {size_text(best['bytes'])}B)"
        self._end(event, f"complete: up to {what}; {share}")

    def _on_reevaluated(self, event: Mapping[str, Any]) -> None:
        if "error" in event:
            self._say(f"{event['trial']} not verified on fresh samples: {event['error']}")
        for point in event["points"]:
            share = f"{point['certified_accuracy']:.1%} certified on {point['samples']} fresh samples"
            self._say(f"{event['trial']} {point['level']}: {share}")

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self._end(event, f"failed: {event['error']}")

    def _on_waiting(self, event: Mapping[str, Any]) -> None:
        self.open.pop(event["trial"], None)
        self.waiting.add(event["trial"])
        self._say(f"{event['trial']} waits: {event['reason']} [{self._done_text()}]")

    def _on_rung(self, event: Mapping[str, Any]) -> None:
        if event.get("promoted"):
            self.waiting.discard(event["trial"])
            self.open[event["trial"]] = _Trial(epoch=event["epoch"])
            self._say(
                f"{event['trial']} is promoted: {event['rank']} of {event['of']} at rung {event['rung']:g} by now"
            )

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self._end(event, f"stopped: {event['reason']}")

    def _end(self, event: Mapping[str, Any], text: str) -> None:
        self.open.pop(event["trial"], None)
        self.waiting.discard(event["trial"])
        self.ended += "of" not in event  # a replicate is no trial of the search
        self._say(f"{event['trial']} {text} [{self._done_text()}]")

    # --- what is shown

    def _say(self, line: str) -> None:
        if self.live:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:  # a plain line, without the millisecond that laying it out takes
            self.console.file.write(f"{line}\n")
            self.console.file.flush()

    def _done_text(self) -> str:
        waiting = f"{len(self.waiting)} waiting" if self.waiting else ""
        done = f"{self.ended} of {self.space.search.trials} trials"
        return ", ".join(filter(None, (done, waiting, self.left_text())))

    def left_text(self) -> str:
        """The time left, from the pace of this driver; empty until a trial has ended under it. One that waits is done
        with, as far as is known."""
        done = self.ended + len(self.waiting)
        ended = done - self.ended_before
        left = max(self.space.search.trials - done, 0)
        if not ended or not left:
            return ""
        return f"about {duration_text((time.monotonic() - self.begun) / ended * left)} left"

    def _view(self) -> RenderableType:
        with self.lock:
            head = Table.grid(padding=(0, 1))
            bar = ProgressBar(
                total=self.space.search.trials, completed=min(self.ended, self.space.search.trials), width=30
            )
            head.add_row(bar, Text(self._done_text()), Text(duration_text(time.monotonic() - self.begun), style="dim"))
            rows = Table.grid(padding=(0, 2))
            for name, trial in self.open.items():
                rows.add_row(Text(name, style="bold"), *self._trial_cells(trial))
            return Group(head, rows, Text(self._best_text(), style="dim"))

    def _trial_cells(self, trial: _Trial) -> tuple[RenderableType, ...]:
        if not trial.trained:
            bar = ProgressBar(total=max(trial.epochs, 1), completed=trial.epoch, width=20)
            return bar, Text(f"epoch {trial.epoch}/{trial.epochs or '?'}"), Text(_metrics(trial.metrics))
        total = self._verdicts_in_all()
        bar = ProgressBar(total=total or 1, completed=min(trial.verified, total or 0), width=20)
        more = f", {trial.dear:,} of them after dear verification" if trial.dear else ""
        return bar, Text("verifying"), Text(f"{trial.verified:,}{f' of {total:,}' if total else ''} verdicts{more}")

    def _verdicts_in_all(self) -> int:
        """Verdicts that a trial needs: known from the space, or from a trial that is complete."""
        samples = self.space.samples if isinstance(self.space.samples, int) else 0
        if self.samples is not None:
            samples = self.samples
        return samples * len(self.space.levels)

    def _best_text(self) -> str:
        front = self.leading.points
        if not front:
            return "no point yet"
        best = max(front, key=lambda p: (p["certified_accuracy"], -p["bytes"]))
        small = min(front, key=lambda p: (p["bytes"], -p["certified_accuracy"]))
        shown = (
            f"{p['certified_accuracy']:.1%} at {size_text(p['bytes'])}B ({p['trial']} {p['level']})"
            for p in (best, small)
        )
        return "best certified {}; smallest {}; {} points on the front".format(*shown, len(front))


def _metrics(metrics: Mapping[str, Any]) -> str:
    parts = []
    for key, name in _SHORT.items():
        value = metrics.get(key)
        if isinstance(value, int | float):
            parts.append(f"{name} {value:.1%}" if key.endswith("accuracy") else f"{name} {value:.3g}")
    return "  ".join(parts)
