"""Studies whose driver was killed go on from what it left, states of trials in flight included."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_support import CactusRay, Copied

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]


def go_on(run: Path) -> list[dict[str, Any]]:
    """Resume a study in a process of its own; the events that this adds. What was on record stays as it was.

    On a busy machine Ray may not start in time; then the same command goes on, as it says.
    """
    before = (run / "trials.jsonl").read_bytes()
    arguments = ["search", "--resume", run.name, "--runs", str(run.parent)]
    for _ in range(3):
        found = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
        if "Ray did not start" not in found.stderr:
            break
    assert found.returncode == 0, found.stdout + found.stderr
    after = (run / "trials.jsonl").read_bytes()
    assert after.startswith(before)
    return [json.loads(line) for line in after[len(before) :].splitlines() if line]


def states(run: Path) -> dict[str, int]:
    """The epoch of the state that is kept of each trial, by its file's name."""
    files = (re.fullmatch(r"(t\d+)-(\d+)-[0-9a-f]{64}\.safetensors", f.name) for f in (run / "in_flight").iterdir())
    return {found[1]: int(found[2]) for found in files if found}


def of(events: list[dict[str, Any]], kind: str) -> list[tuple[str, Any]]:
    return [(event["trial"], event.get("epoch")) for event in events if event["event"] == kind]


def test_a_trial_in_flight_goes_on_from_its_epoch(cactus_ray: CactusRay, copied: Copied) -> None:
    """t0001 is complete and stays; t0002 goes on from its state; t0003 is the suggestion that was queued."""
    run = copied("studies/half_finished")
    ((trial, epoch),) = states(run).items()
    assert (trial, epoch > 0) == ("t0002", True)
    events = go_on(run)
    assert of(events, "begun") == [("t0002", epoch), ("t0003", 0)]
    epochs = of(events, "epoch")
    assert epochs == [("t0002", e) for e in range(epoch + 1, 11)] + [("t0003", e) for e in range(1, 11)]
    assert {name for name, _ in of(events, "completed")} == {"t0002", "t0003"}
    found = cactus_ray("status", run, "--json").json
    assert (found["status"], found["trials"]) == ("completed", {"completed": 3})
    assert found["records"][2]["parameters"] == {"learning_rate": 0.004}
    assert [row["verdicts"] for row in found["records"]] == [80, 80, 80]
    assert list((run / "in_flight").iterdir()) == []


def test_trials_that_wait_are_promoted_or_stopped(cactus_ray: CactusRay, copied: Copied) -> None:
    """Six trials are asked for; three wait. Those that are promoted go on from the states that were kept."""
    run = copied("studies/waiting")
    waiting = states(run)
    assert set(waiting) == {"t0001", "t0002", "t0003"}
    events = go_on(run)
    begun: dict[str, int] = {}
    for name, epoch in of(events, "begun"):
        begun.setdefault(name, epoch)
    assert set(begun) >= {"t0004", "t0005", "t0006"}
    promoted = begun.keys() & waiting.keys()
    assert promoted
    assert {name: begun[name] for name in promoted} == {name: waiting[name] for name in promoted}
    assert {begun[name] for name in begun.keys() - promoted} == {0}
    found = cactus_ray("status", run, "--json").json
    assert found["status"] == "completed"
    assert set(found["trials"]) == {"completed", "stopped"}
    assert sum(found["trials"].values()) == 6
    assert list((run / "in_flight").iterdir()) == []
