"""Tables and JSON of a run, and the progress display with and without a terminal."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from studies import events, small_space, write_run

from cactus_ray.report.ledger import Spent, ledger_of, ledger_table
from cactus_ray.report.tables import spent_hours
from cactus_ray.report.terminal import StudyProgress, front_table, print_front, print_status, status_table, to_json
from cactus_ray.search.space import load_space
from cactus_ray.search.store import Records, read_records, with_front


def console(terminal: bool = False, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def printed(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    space = small_space()
    return write_run(tmp_path / "digits", space, events(space, failure="[red]not markup[/red] </b>"))


def test_front_table_shows_the_front_and_nothing_else(run: Path) -> None:
    points = with_front(read_records(run), small_space().front)
    where = console()
    where.print(front_table(points))
    text = printed(where)
    for point in points:
        assert (f"{point['bytes']:,}" in text) == point["on_front"]
    assert "t0002" not in text
    assert "90.0%" in text
    assert "93.0%" in text  # the upper end: three samples are unknown


def test_status_table_names_the_reason_as_it_was(run: Path) -> None:
    where = console()
    where.print(status_table(read_records(run)))
    text = printed(where)
    assert "[red]not markup[/red] </b>" in text
    assert text.count("completed") == 4


def test_the_status_says_where_the_verifiers_seconds_went(run: Path) -> None:
    where = console()
    print_status(where, run, read_records(run), as_json=False)
    assert "verifiers: attack 3.6 s, ibp 2.0 s, overhead 0.4 s" in printed(where)


def test_tables_are_readable_in_a_narrow_terminal(run: Path) -> None:
    where = console(width=80)
    print_front(where, run, read_records(run), as_json=False)
    print_status(where, run, read_records(run), as_json=False)
    lines = printed(where).splitlines()
    assert max(len(line) for line in lines if "report:" not in line) <= 80
    assert any("[red]not markup[/red] </b>" in line for line in lines)  # not torn to pieces in a column of its own


def test_front_as_json(run: Path) -> None:
    where = console(width=40)
    print_front(where, run, read_records(run), as_json=True)
    found = json.loads(printed(where))
    assert found["status"] == "completed"
    assert found["trials"] == {"completed": 4, "stopped": 1, "failed": 1}
    assert found["points"] == 12
    assert {row["trial"] for row in found["front"]} <= {"t0001", "t0004", "t0005", "t0006"}


def test_the_ledger_of_trials_adds_up_to_what_limits_are_held_against(run: Path) -> None:
    space, records = load_space(run / "space.yaml"), read_records(run)
    asked = replace(
        space.resources, workers=2, cpus_per_worker=3.0, gpus_per_worker=0.5, cpus_per_verifier=2.0,
        gpus_per_verifier=0.25,
    )  # fmt: skip
    shared = replace(space, resources=asked)
    records.trials["t0001"].gpus = 0.25  # it shared a GPU
    found = [s for trial in records.trials.values() for s in ledger_of(shared, trial).values()]
    hours = spent_hours(shared, records)
    assert sum(s.cpu_seconds for s in found) == pytest.approx(3600 * hours["of CPUs"])
    assert sum(s.gpu_seconds for s in found) == pytest.approx(3600 * hours["of GPUs"])
    first = ledger_of(shared, records.trials["t0001"])
    assert list(first) == ["training", "attack", "ibp", "overhead"]
    assert first["training"] == Spent(9.0, 54.0, 4.5)
    assert first["attack"] == Spent(0.9, 1.8, 0.225)
    columns, rows = ledger_table(shared, records)
    assert [c.heading for c in columns] == [
        "trial", "training s", "attack s", "ibp s", "overhead s", "CPU s", "GPU s",
    ]  # fmt: skip
    assert [cell.shown for cell in rows[1]] == ["t0002", "2.5", "0.0", "0.0", "0.0", "15.0", "2.5"]
    assert "GPU s" not in [c.heading for c in ledger_table(space, read_records(run))[0]]
    assert ledger_table(space, Records()) == ([columns[0], columns[5]], [])


def test_status_as_json(run: Path) -> None:
    where = console()
    print_status(where, run, read_records(run), as_json=True)
    found = json.loads(printed(where))
    assert found["verifier_seconds"] == pytest.approx({"attack": 3.6, "ibp": 2.0, "overhead": 0.4})
    trials = {row["trial"]: row for row in found["records"]}
    assert trials["t0002"]["error"].startswith("[red]")
    assert trials["t0002"]["metrics"] == {}
    assert (trials["t0001"]["levels_verified"], trials["t0001"]["verdicts"]) == (3, 300)
    assert trials["t0001"]["verifier_seconds"] == {"attack": 0.9, "ibp": 0.5, "overhead": 0.1}
    assert trials["t0001"]["ledger"]["training"] == {"seconds": 9.0, "cpu_seconds": 9.0, "gpu_seconds": 0.0}
    assert set(trials["t0002"]["ledger"]) == {"training"}


def test_front_of_an_empty_run(tmp_path: Path) -> None:
    space = small_space()
    run = write_run(tmp_path / "run", space, list(events(space))[:1])
    where = console()
    print_front(where, run, read_records(run), as_json=False)
    assert "no trial is complete" in printed(where)


def test_json_has_no_nan() -> None:
    rows = to_json([{"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": (1, "x", None)}])
    assert rows == [{"a": None, "b": [1.0, None], "c": {"d": None}, "e": [1, "x", None]}]
    json.dumps(rows, allow_nan=False)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    space, where = small_space(), console()
    with StudyProgress(space, Records(), console=where) as progress:
        for event in events(space):
            progress.event(event)
    lines = printed(where).splitlines()
    assert lines[0] == "study digits: 6 trials, 3 levels each"
    assert any(line.startswith("t0001 epoch 1/3: loss 2  standard 30.0%") for line in lines)
    assert sum(line.startswith("t0001 epoch") for line in lines) == 1  # the others came too soon after
    assert any("t0002 failed: loss is not finite at step 7 [2 of 6 trials" in line for line in lines)
    assert any("t0003 stopped: dominated" in line for line in lines)
    assert "t0006 complete: up to 90.0% certified (dense, 60.1 kB)" in lines[-1]
    assert "\x1b" not in printed(where)


def test_progress_on_a_terminal_shows_running_trials() -> None:
    space, where = small_space(), console(terminal=True)
    with StudyProgress(space, Records(), console=where) as progress:
        for event in events(space):
            progress.event(event)
            if event["event"] == "epoch" and (event["trial"], event["epoch"]) == ("t0005", 2):
                view = console()
                view.print(progress._view())
            if event["event"] == "verdicts" and event["trial"] == "t0006":
                verifying = console()
                verifying.print(progress._view())
    assert "epoch 2/3" in printed(view)
    assert "4 of 6 trials, about" in printed(view)
    assert "best certified 80.0% at 60.1 kB (t0004 dense)" in printed(view)
    assert "300 of 300 verdicts" in printed(verifying)
    assert "t0002 failed" in printed(where)


def test_progress_goes_on_where_an_earlier_driver_ended(run: Path) -> None:
    with StudyProgress(small_space(trials=8), read_records(run), console=console()) as progress:
        assert progress.ended == 6
        assert progress.left_text() == ""
        progress.event({"event": "stopped", "trial": "t0007", "reason": "rung 1"})
        assert progress.left_text().endswith("left")


def test_progress_counts_trials_that_wait_until_they_are_promoted_or_stopped() -> None:
    space, where = small_space(), console()
    rung = {"event": "rung", "trial": "t0001", "epoch": 3, "rank": 1, "of": 3, "rung": 3.0, "go_on": True}
    with StudyProgress(space, Records(), console=where) as progress:
        for trial in ("t0001", "t0002"):
            progress.event({"event": "started", "trial": trial, "parameters": {}})
            progress.event({"event": "waiting", "trial": trial, "reason": "2 of 2 at rung 3"})
        assert "t0002 waits: 2 of 2 at rung 3 [0 of 6 trials, 2 waiting, about" in printed(where)
        assert not progress.open
        progress.event(rung)  # of a trial that never waited
        assert (progress.waiting, list(progress.open)) == ({"t0001", "t0002"}, [])
        progress.event({**rung, "promoted": True})
        assert (progress.waiting, list(progress.open)) == ({"t0002"}, ["t0001"])
        progress.event({"event": "stopped", "trial": "t0002", "reason": "2 of 2 at rung 3"})
        assert (progress.waiting, progress.ended) == (set(), 1)
    assert "t0001 is promoted: 1 of 3 at rung 3 by now" in printed(where)


def test_disabled_progress_prints_nothing() -> None:
    space, where = small_space(), console()
    with StudyProgress(space, Records(), enabled=False, console=where) as progress:
        for event in events(space):
            progress.event(event)
    assert printed(where) == ""
