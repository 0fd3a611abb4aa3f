"""``cactus-ray suggest``, ``explain`` and ``dashboard``: what can be done with a study from outside its driver."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cactus_ray.commands.report import space_of
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.report.again import again_lines
from cactus_ray.report.tables import parameters_text
from cactus_ray.search.explain import explain as explained
from cactus_ray.search.optuna_file import write_storage
from cactus_ray.search.overrides import override_value
from cactus_ray.search.points import check_point, plain_points, suggest
from cactus_ray.search.store import read_records

SHOWN_RIVALS = 3


def queue(console: Console, run: Path, values: Mapping[str, str], *, as_json: bool) -> None:
    """Queue a configuration into a study, running or not; parameters that ``values`` leaves out are drawn.

    Raises UserError for what is no run, no value of its space, or was tried already.
    """
    space, records = space_of(run), read_records(run)
    point = check_point(space, {key: override_value(key, text) for key, text in values.items()}, "--set ")
    if not point:
        names = ", ".join(p.name for p in space.parameters)
        raise UserError(f"--set: got nothing that is searched; expected a value of one or more of {names}")
    plain = plain_points([point])[0]
    for trial in records.trials.values():
        if plain.items() <= trial.parameters.items():
            raise UserError(f"--set: trial {trial.id} has these values already ({trial.status}); expected others")
    suggest(run, point)
    left = max(space.search.trials - len(records.drawn()), 0)
    if as_json:
        console.print_json(json.dumps({"run": str(run), "values": plain, "trials_left": left}))
        return
    console.print(f"queued: {parameters_text(plain)}", highlight=False, markup=False, soft_wrap=True)
    if records.finished is not None:
        console.print(
            "no driver works on this study now; the next cactus-ray search of it takes this up"
            + ("" if left else f", with --trials {space.search.trials + 1} or more: all its trials are done"),
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def explain(console: Console, run: Path, trial: str, *, as_json: bool) -> None:
    """Print what became of a trial: its end, broken constraints, and what dominates which point by how much."""
    found = explained(space_of(run), read_records(run), trial)
    if as_json:
        console.print_json(json.dumps(found))
        return
    lines = [f"{trial}: {found['reason']}", f"values: {parameters_text(found['parameters'])} ({found['origin']})"]
    lines += [found["note"]] if found["note"] else []
    if "of" in found:
        lines += [f"a replicate: {found['of']} again, its seed number {found['replicate']} ({found['seed']})"]
    lines += [f"objective {name}: {value:.4g}" for name, value in found.get("objectives", {}).items()]
    for name, violation in found["constraints"].items():
        lines.append(f"constraint {name}: " + (f"not met, by {violation:.4g}" if violation > 0 else "met"))
    for point in found["points"]:
        lines += _point_lines(point)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if "rung" in found and found["status"] != "completed":
        _print_rung(console, trial, found["rung"])


def _print_rung(console: Console, trial: str, rung: Mapping[str, Any]) -> None:
    """What was compared at a trial's last rung: a column per trial, this one first, then those that stood better."""
    now = rung.get("now")
    words = f"rung {rung['rung']:g}: {rung['rank']} of {rung['of']} when it came"
    words += f", {now['rank']} of {now['of']} by now" if now else ""
    words += ", and went on" if rung["went_on"] else ""
    words += f" (by fronts, and within a front by {rung['ranking'].replace('_', ' ')})"
    if rung["front"] is None:
        words += "; not compared, because a value is missing or not finite"
    console.print(words, highlight=False, markup=False, soft_wrap=True)
    own = {"trial": trial, **rung, **(now or {})}
    columns = [own, *rung["better"][:SHOWN_RIVALS]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("compared", overflow="fold")
    table.add_column("better is", no_wrap=True)
    for column in columns:
        table.add_column(Text(column["trial"]), justify="right", no_wrap=True)
    rows = [("rank", "", [str(c["rank"]) for c in columns])]
    rows += [("front", "", ["-" if c["front"] is None else str(c["front"] + 1) for c in columns])]
    for name, goal in rung["goals"].items():
        rows += [(name, "more" if goal == "maximize" else "less", [_value(c["values"].get(name)) for c in columns])]
    rows += [("share of its epochs", "less", [f"{c['progress']:.0%}" for c in columns])]
    rows += [(f"dominates {trial}", "", ["", *("yes" if c["dominates"] else "no" for c in columns[1:])])]
    for heading, better, cells in rows:
        table.add_row(Text(heading), better, *map(Text, cells))
    console.print(table)


def _value(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


def _point_lines(point: Mapping[str, Any]) -> list[str]:
    if "original" in point:
        pairs = ((column, point[column], value) for column, value in point["original"].items())
        words = ", ".join(f"{column} {value:.6g} (the first seed: {first:.6g})" for column, value, first in pairs)
        return [f"{point['level']}: {words}"]
    if point["on_front"]:
        return [f"{point['level']}: on the front", *(f"  {line}" for line in again_lines(point))]
    rivals = point["dominated_by"]
    lines = [f"{point['level']}: dominated by {len(rivals)} point(s) of the front"]
    for rival in rivals[:SHOWN_RIVALS]:
        gains = ", ".join(
            f"{column} {point[column] + gain:.6g} instead of {point[column]:.6g}"
            for column, gain in rival["gains"].items()
        )
        lines.append(f"  {rival['trial']} {rival['level']}: {gains}, and no worse elsewhere")
    return lines


def dashboard(console: Console, run: Path, port: int) -> None:
    """Show a run in optuna-dashboard on localhost, from a copy of its records in a scratch folder, until Ctrl-C."""
    try:
        library = importlib.import_module("optuna_dashboard")
    except ImportError:
        raise UserError(
            "dashboard: optuna-dashboard is not installed; add it with: pip install 'cactus-ray[dashboard]'"
        ) from None
    if not 0 < port < 65536:
        raise ConfigError("--port", port, "a port from 1 to 65535")
    space, records = space_of(run), read_records(run)
    with tempfile.TemporaryDirectory(prefix="cactus-ray-") as folder:
        file = Path(folder, "study.journal")
        write_storage(space, records, file)
        text = f"{run} as it is now: http://localhost:{port} (Ctrl-C ends it)"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        from cactus_ray.search.warm import open_storage

        try:
            library.run_server(open_storage(str(file)), host="localhost", port=port)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; expected a free port, such as --port 8081") from error
