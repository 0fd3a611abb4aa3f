"""The rows of the page's tables, as plain values that the template only has to write down."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cactus_ray.report.figures import Point, duration_text, size_text, upper_end
from cactus_ray.report.ticks import metric_text
from cactus_ray.search.budget import cpu_seconds, gpu_seconds, train_seconds, training_on_gpus
from cactus_ray.search.objectives import feasible
from cactus_ray.search.pareto import knee
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, TrialRecord
from cactus_ray.verification.verdict import wilson

FIRST = {"maximize": "descending", "minimize": "ascending"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. ``first``: direction of the first click on its heading."""

    heading: str
    text: bool = False
    first: str = "descending"


@dataclass(frozen=True, slots=True)
class Cell:
    """``value`` is what is sorted by, ``shown`` what is read."""

    value: str
    shown: str
    text: bool = False


@dataclass(frozen=True, slots=True)
class PointRow:
    """One point; ``front``: whether it is on the front."""

    cells: tuple[Cell, ...]
    front: bool


_Shown = Callable[[Point], tuple[Any, str]]
_POINT_CELLS: tuple[tuple[Column, _Shown], ...] = (
    (Column("trial", True, "ascending"), lambda p: (p["trial"], str(p["trial"]))),
    (Column("level", True, "ascending"), lambda p: (p["level"], str(p["level"]))),
    (Column("bytes", first="ascending"), lambda p: (p["bytes"], f"{p['bytes']:,}")),
    (Column("certified"), lambda p: (p["certified_accuracy"], f"{p['certified_accuracy']:.1%}")),
    (Column("95 %"), lambda p: (wilson(p["n_certified"], p["samples"])[0], _interval(p))),
    (Column("upper end"), lambda p: (upper_end(p), f"{upper_end(p):.1%}")),
    (Column("standard"), lambda p: (p["standard_accuracy"], f"{p['standard_accuracy']:.1%}")),
    (Column("front"), lambda p: (int(p["on_front"]), "yes" if p["on_front"] else "no")),
    (Column("unknown"), lambda p: (p["n_unknown"], str(p["n_unknown"]))),
    (Column("samples"), lambda p: (p["samples"], f"{p['samples']:,}")),
    (Column("method", True, "ascending"), lambda p: (p["method"], str(p["method"]))),
    (Column("ideal bytes", first="ascending"), lambda p: (p["ideal_bits"], f"{math.ceil(p['ideal_bits'] / 8):,}")),
    (Column("MACs", first="ascending"), lambda p: (p["macs"], size_text(p["macs"]))),
    (Column("training s", first="ascending"), lambda p: (p["train_seconds"], f"{p['train_seconds']:.1f}")),
    (Column("verification s", first="ascending"), lambda p: (p["verify_seconds"], f"{p['verify_seconds']:.1f}")),
)
POINT_COLUMNS = tuple(column for column, _ in _POINT_CELLS)


def point_rows(points: Sequence[Point]) -> list[PointRow]:
    """All points, those of the front first, then by size."""
    rows = []
    for p in sorted(points, key=lambda p: (not p["on_front"], p["bytes"], -p["certified_accuracy"])):
        shown = [(column.text, *show(p)) for column, show in _POINT_CELLS]
        rows.append(PointRow(tuple(Cell(str(value), read, text) for text, value, read in shown), bool(p["on_front"])))
    return rows


def _interval(point: Point) -> str:
    low, high = wilson(point["n_certified"], point["samples"])
    return f"{low:.1%} - {high:.1%}"


def trial_columns(space: Space) -> list[Column]:
    """Headings of the table of trials; one per objective."""
    return [
        Column("trial", True, "ascending"), Column("status", True, "ascending"),
        *(Column(o.metric.replace("_", " "), first=FIRST[o.goal]) for o in space.objectives),
        *([Column("constraints", True, "ascending")] if space.constraints else []),
        Column("epochs"), Column("training s", first="ascending"), Column("verification s", first="ascending"),
        Column("parameters", True, "ascending"),
    ]  # fmt: skip


def trial_rows(space: Space, records: Records) -> list[list[Cell]]:
    """All trials, whatever became of them, in the order in which they began."""
    seconds = seconds_by_trial(records)
    rows = []
    for trial in records.trials.values():
        train, verify = seconds.get(trial.id, (None, None))
        rows.append(
            [
                Cell(trial.id, trial.id, True), Cell(trial.status, trial.status, True),
                *(_metric(o.metric, trial.metrics.get(o.metric)) for o in space.objectives),
                *([_met(space, trial)] if space.constraints else []),
                Cell(str(_epochs(trial)), str(_epochs(trial))),
                _number(train, lambda v: f"{v:.1f}"), _number(verify, lambda v: f"{v:.1f}"),
                Cell(_asked(trial), _asked(trial), True),
            ]
        )  # fmt: skip
    return rows


def _met(space: Space, trial: TrialRecord) -> Cell:
    if trial.status != "completed":
        return Cell("", "", True)
    broken = [name for name, violation in feasible(trial.metrics, space.constraints).items() if violation > 0]
    text = f"not met: {'; '.join(broken)}" if broken else "met"
    return Cell(text, text, True)


def _metric(name: str, value: float | None) -> Cell:
    return _number(value, lambda v: metric_text(name, v))


def _number(value: float | None, show: Callable[[float], str]) -> Cell:
    return Cell("", "-") if value is None else Cell(repr(float(value)), show(value))


def lost_trials(records: Records) -> list[dict[str, Any]]:
    """Failed and stopped trials with their reasons."""
    return [
        {
            "id": trial.id, "status": trial.status, "epochs": _epochs(trial),
            "reason": trial.error or "no reason recorded", "parameters": _asked(trial),
        }
        for trial in records.trials.values()
        if trial.status in ("failed", "stopped")
    ]  # fmt: skip


def _epochs(trial: TrialRecord) -> int:
    return max((int(e["epoch"]) for e in trial.epochs), default=0)


def _asked(trial: TrialRecord) -> str:
    """What was asked of a trial: its values, or whom it repeats."""
    return f"seed {trial.replicate} of {trial.of}" if trial.of else parameters_text(trial.parameters)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Drawn values in one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in parameters.items())


def value_text(value: Any) -> str:
    """A drawn value; fractions with four digits, which is more than anybody should copy."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def seconds_by_trial(records: Records) -> dict[str, tuple[float, float]]:
    """Seconds of training and of verification for every trial on which either was spent.

    Verification is all that verifiers worked for the trial, also what was lost with them. Training is exact for trials
    that were trained; for others it is the epochs that were reported.
    """
    found = {}
    for trial in records.trials.values():
        verify = sum(trial.ledger.values())
        train = train_seconds(trial)
        if train or verify:
            found[trial.id] = (train, float(verify))
    return found


def spent_hours(space: Space, records: Records) -> dict[str, float]:
    """Hours that drivers worked, and hours of CPUs and GPUs as they were asked for; what limits are held against."""
    pairs = seconds_by_trial(records)
    training, verify = {trial: pair[0] for trial, pair in pairs.items()}, sum(pair[1] for pair in pairs.values())
    gpus = {trial.id: trial.gpus for trial in records.trials.values() if trial.gpus is not None}
    cpu = cpu_seconds(space.resources, sum(training.values()), verify)
    gpu = gpu_seconds(space.resources, training_on_gpus(space.resources, training, gpus), verify)
    return {"of work": sum(records.drivers) / 3600, "of CPUs": cpu / 3600, "of GPUs": gpu / 3600}


def packing_text(event: Mapping[str, Any]) -> str:
    """How many trials share a GPU, and why, from the record that says so."""
    number = event["trials_per_gpu"]
    if event["event"] == "oom":
        used = f" after {size_text(event['peak'])}B" if "peak" in event else ""
        return f"ran out of GPU memory{used} and is queued again; from here on at most {number} trial(s) per GPU"
    text = f"{number} trial(s) per GPU ({event['why']}"
    if profile := event.get("profile"):
        needed = f"{size_text(profile['held'])}B and {size_text(profile['context'])}B for CUDA"
        text += f": a trial needs {needed} of {size_text(profile['total'])}B, {profile['device']}"
    return f"{text})"


def ledger_text(ledger: Mapping[str, float]) -> str:
    """Seconds of verifiers by stage in one line, the largest first; empty where nothing was verified."""
    parts = [(stage, seconds) for stage, seconds in ledger.items() if seconds > 0]
    return ", ".join(f"{stage} {duration_text(seconds)}" for stage, seconds in sorted(parts, key=lambda p: -p[1]))


def example_command(run: Path, points: Sequence[Point], front: Mapping[str, str]) -> str | None:
    """A ``pick`` by requirements that the front's most balanced point just meets; None without a front."""
    chosen = knee(points, front)
    if chosen is None:
        return None
    point = points[chosen]
    size = math.ceil(point["bytes"] / 1000)
    certified, accuracy = (math.floor(point[c] * 100) / 100 for c in ("certified_accuracy", "standard_accuracy"))
    return (
        f"cactus-ray pick {shlex.quote(str(run))} --max-bytes {size}k --min-certified {certified:g}"
        f" --min-accuracy {accuracy:g} --prefer certified --out picked"
    )


def front_trials(run: Path, records: Records, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Trials with points on the front, most of them first: parameters, and the command that picks each point."""
    leading: dict[str, list[Point]] = {}
    for point in points:
        if point["on_front"]:
            leading.setdefault(point["trial"], []).append(point)
    found = []
    for trial in sorted(leading, key=lambda t: -len(leading[t])):
        record = records.trials[trial]
        found.append(
            {
                "id": trial, "method": leading[trial][0]["method"], "seed": record.seed,
                "config_hash": record.config_hash, "levels": [p["level"] for p in leading[trial]],
                "parameters": [(name, value_text(value)) for name, value in record.parameters.items()],
                "commands": [_pick_command(run, p) for p in leading[trial]],
            }
        )  # fmt: skip
    return found


def _pick_command(run: Path, point: Point) -> str:
    folder = re.sub(r"[^A-Za-z0-9.+-]", "-", f"{point['trial']}-{point['level']}")
    options = f"--trial {shlex.quote(point['trial'])} --level {shlex.quote(point['level'])}"
    return f"cactus-ray pick {shlex.quote(str(run))} {options} --out picked/{folder}"
