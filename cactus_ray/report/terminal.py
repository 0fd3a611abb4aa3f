"""What is printed: the front and the state of a run as tables or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cactus_ray.report.again import again_notes
from cactus_ray.report.figures import Point, size_text, upper_end
from cactus_ray.report.ledger import ledger_json
from cactus_ray.report.progress import StudyProgress
from cactus_ray.report.resume import go_on, resume_arguments
from cactus_ray.report.tables import ledger_text, packing_text, seconds_by_trial, spent_hours
from cactus_ray.search.replicates import seen_again
from cactus_ray.search.space import Space, load_space
from cactus_ray.search.store import Records, TrialRecord, with_front
from cactus_ray.verification.verdict import wilson

__all__ = ["StudyProgress", "front_table", "print_front", "print_status", "status_table", "to_json"]


NOTES_WIDTH = 110
"""Columns of a terminal from which on notes stand beside what they are about; in a narrower one they stand below."""


def front_table(points: Sequence[Point]) -> Table:
    """The points that are on the front, smallest first, with both ends of the certified accuracy; 80 columns wide."""
    table = Table(
        title="Front (selection split)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for heading, right in (
        ("trial", False), ("level", False), ("bytes", True), ("certified", True), ("95 %", True), ("at most", True),
        ("standard", True),
    ):  # fmt: skip
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "level", overflow="fold")
    for p in sorted((p for p in points if p["on_front"]), key=lambda p: (p["bytes"], -p["certified_accuracy"])):
        low, high = wilson(p["n_certified"], p["samples"])
        cells = (
            p["trial"], p["level"], f"{p['bytes']:,}", f"{p['certified_accuracy']:.1%}",
            f"{100 * low:.1f}-{high:.1%}", f"{upper_end(p):.1%}", f"{p['standard_accuracy']:.1%}",
        )  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def status_table(records: Records, *, notes: bool = True) -> Table:
    """One row per trial: how far it is, what it cost, and with ``notes`` why it ended."""
    seconds = seconds_by_trial(records)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    headings = ("trial", "status", "epochs", "verdicts", "certified", "train s", "verify s", "note")
    for heading in headings if notes else headings[:-1]:
        right = heading not in ("trial", "status", "note")
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "note", overflow="fold")
    for trial in records.trials.values():
        train, verify = seconds.get(trial.id, (0.0, 0.0))
        mean = trial.metrics.get("mean_certified_accuracy")
        cells = (
            trial.id, trial.status, _epochs(trial), f"{_verdicts(trial):,}",
            "-" if mean is None else f"{mean:.1%}", f"{train:.1f}", f"{verify:.1f}", _note(trial),
        )  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in (cells if notes else cells[:-1])))
    return table


def print_front(console: Console, run: Path, records: Records, *, as_json: bool) -> None:
    """Print the front of a run, and where its page lies. Raises UserError where the folder holds no space."""
    goals = load_space(run / "space.yaml").front
    points = seen_again(records, with_front(records, goals), goals)
    front = [p for p in points if p["on_front"]]
    if as_json:
        _print_json(console, {"run": str(run), **_counts(records), "points": len(points), "front": to_json(front)})
        return
    if not points:
        console.print("no trial is complete, so there is no front yet", highlight=False)
    else:
        console.print(front_table(points))
        sizes = " to ".join(size_text(f(p["bytes"] for p in front)) for f in (min, max))
        console.print(f"{len(front)} of {len(points)} points, {sizes} bytes (k = 1,000)", highlight=False, markup=False)
    _print_end(console, run, records)
    for note in again_notes(records, front):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {run / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def print_status(console: Console, run: Path, records: Records, *, as_json: bool) -> None:
    """Print how far a run is. Raises UserError where the folder holds no space."""
    space = load_space(run / "space.yaml")
    counts = _counts(records)
    if as_json:
        trials = [_trial_json(space, trial) for trial in records.trials.values()]
        asked = {"run": str(run), "asked": space.search.trials, **counts, "verifier_seconds": records.ledger()}
        asked |= {"hours": spent_hours(space, records), "packing": records.packing}
        _print_json(console, {**asked, "records": to_json(trials)})
        return
    wide = console.width >= NOTES_WIDTH
    console.print(status_table(records, notes=wide))
    for trial in records.trials.values():
        if not wide and (note := _note(trial)):
            console.print(f"{trial.id}: {note}", highlight=False, markup=False)
    states = ", ".join(f"{number} {state}" for state, number in counts["trials"].items())
    console.print(
        f"{space.name}: {counts['status']}; of {space.search.trials} trials {states}", highlight=False, markup=False
    )
    _print_end(console, run, records)
    if again := ", ".join(f"{number} {state}" for state, number in counts.get("replicates", {}).items()):
        console.print(f"replicates: {again}", highlight=False, markup=False)
    hours = ", ".join(f"{value:.3g} {kind}" for kind, value in spent_hours(space, records).items() if value > 0)
    if hours:
        console.print(f"hours: {hours}", highlight=False, markup=False)
    if records.packing:
        packing = records.packing
        console.print(f"{packing.get('trial', '')} {packing_text(packing)}".strip(), highlight=False, markup=False)
    if stages := ledger_text(records.ledger()):
        console.print(f"verifiers: {stages}", highlight=False, markup=False)
    if records.damaged_lines:
        console.print(f"{records.damaged_lines} lines of trials.jsonl are damaged and ignored", highlight=False)


def _print_end(console: Console, run: Path, records: Records) -> None:
    """Of an interrupted search, how it goes on; of others nothing."""
    if records.finished and records.finished.get("status") == "interrupted":
        words = go_on(["cactus-ray", *resume_arguments(run)])
        more = "with --address, --storage, --init and --trust-code where they were given before"
        console.print(f"{words} ({more})", highlight=False, markup=False, soft_wrap=True)


def to_json(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as plain JSON data; what is not finite becomes null."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _print_json(console: Console, value: Mapping[str, Any]) -> None:
    console.print(json.dumps(_plain(value), allow_nan=False, indent=2), markup=False, highlight=False, soft_wrap=True)


def _counts(records: Records) -> dict[str, Any]:
    states = [trial.status for trial in records.drawn()]
    status = str(records.finished.get("status")) if records.finished else "running, or ended without a last word"
    if records.finished and records.finished.get("reason"):
        status += f" ({records.finished['reason']})"
    order = ("completed", "trained", "running", "waiting", "stopped", "failed")
    found = {"status": status, "trials": {state: states.count(state) for state in order if state in states}}
    again = [trial.status for trial in records.replicates()]
    return found | ({"replicates": {state: again.count(state) for state in order if state in again}} if again else {})


def _trial_json(space: Space, trial: TrialRecord) -> dict[str, Any]:
    return {
        "trial": trial.id, "status": trial.status, "epochs": len(trial.epochs), "levels": len(space.levels),
        "levels_verified": len(trial.verdicts), "verdicts": _verdicts(trial), "train_seconds": trial.train_seconds,
        "verifier_seconds": trial.ledger, "ledger": ledger_json(space, trial), "error": trial.error,
        "parameters": trial.parameters, "metrics": trial.metrics,
    }  # fmt: skip


def _note(trial: TrialRecord) -> str:
    return "; ".join(filter(None, (f"seed {trial.replicate} of {trial.of}" if trial.of else "", trial.error)))


def _verdicts(trial: TrialRecord) -> int:
    return sum(len(rows) for rows in trial.verdicts.values())


def _epochs(trial: TrialRecord) -> str:
    last = trial.epochs[-1] if trial.epochs else {}
    return f"{last['epoch']}/{last.get('epochs', '?')}" if last else "0"
