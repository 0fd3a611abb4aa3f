"""W&B files written offline hold the study, and nothing that goes wrong in W&B reaches the search."""

from __future__ import annotations

import json
import math
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import events, small_space, write_run
from wandb.proto import wandb_internal_pb2 as proto

from cactus_ray.report import tracking
from cactus_ray.report.tracking import State, Tracker, choose_mode, has_key, is_reachable

BLOCK = 32 * 1024


def read_offline(path: Path) -> list[proto.Record]:
    """The records of a W&B file: a 7-byte header, then LevelDB log records in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, place, parts = [], 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):  # full or last
            records.append(proto.Record.FromString(parts))
    return records


def values(items: Any) -> dict[str, Any]:
    """Keys (nested ones joined by dots) and values of history or summary items."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def tracked(run: Path) -> dict[str, tuple[Any, list[proto.Record]]]:
    """The W&B runs in a folder by name: the run's record and all records."""
    found = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        records = read_offline(path)
        run_record = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        found[run_record.display_name] = run_record, records
    return found


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine that W&B was never set up on; its caches go to the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name, seconds in (("INIT_SECONDS", 200.0), ("REACH_SECONDS", 60.0), ("TABLE_SECONDS", math.inf)):
        monkeypatch.setattr(tracking, name, seconds)  # what is shown does not depend on how busy the machine is


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield f"http://127.0.0.1:{found.getsockname()[1]}"


def follow(run: Path, lines: list[dict[str, Any]], **options: Any) -> Tracker:
    space = small_space(**options)
    write_run(run, space, lines[:1])
    tracker = Tracker(space.to_dict(), str(run))
    for event in lines:
        tracker.event(event)
    tracker.close(200.0)
    return tracker


def test_offline_files_hold_the_study(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    told = list(events(small_space()))
    late = next(event for event in told if event["event"] == "completed" and event["trial"] == "t0005")
    late["metrics"]["standard_accuracy@int8"] = 0.5  # at least 0.9 is asked for
    tracker = follow(run, told)
    assert tracker.failures == 0
    runs = tracked(run)
    assert set(runs) == {"digits study", *(f"digits t{i:04d}" for i in range(1, 7))}
    assert len({record.run_group for record, _ in runs.values()}) == 1
    assert {record.project for record, _ in runs.values()} == {"tests"}
    assert runs["digits study"][0].job_type == "study"

    (folder,) = run.glob("wandb/offline-run-*-study/files/media")
    table = json.loads(max(folder.glob("table/*.json"), key=lambda path: path.stat().st_size).read_text())
    assert {"trial", "level", "certified_accuracy", "bytes", "on_front"} <= set(table["columns"])
    rows = table["data"]
    assert len(rows) == 12
    assert {row[0] for row in rows} == {"t0001", "t0004", "t0005", "t0006"}
    figure = json.loads(max(folder.glob("plotly/*.json"), key=lambda path: path.stat().st_size).read_text())
    marked = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["x"]) for trace in marked) == 12
    symbols = [symbol for trace in marked for symbol in trace["marker"]["symbol"]]
    assert (symbols.count("x"), symbols.count("circle")) == (3, 9)

    history = [values(r.history.item) for r in runs["digits study"][1] if r.WhichOneof("record_type") == "history"]
    volumes = [row["hypervolume"] for row in history if "hypervolume" in row]
    assert len(volumes) == 4
    assert volumes == sorted(volumes)
    assert [row["points.nrows"] for row in history if "points.nrows" in row] == [3, 12]
    assert history[-1]["front._type"] == "plotly-file"
    assert history[-1]["trials_completed"] == 4
    assert history[-1]["trials_failed"] == history[-1]["trials_stopped"] == 1


def test_trial_runs_hold_epochs_configuration_and_end(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    follow(run, list(events(small_space())))
    runs = tracked(run)
    config = values(runs["digits t0001"][0].config.update)
    assert config["threat"]["epsilon"] == 0.1
    records = runs["digits t0001"][1]
    history = [values(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["loss"] for row in history] == pytest.approx([2.0, 1.0, 2 / 3])
    summary = {key: v for r in records for key, v in values(r.summary.update).items()}
    assert summary["status"] == "completed"
    assert summary["certified_accuracy@int8"] == pytest.approx(0.61)
    failed = runs["digits t0002"][1]
    summary = {key: v for r in failed for key, v in values(r.summary.update).items()}
    assert summary["error"] == "loss is not finite at step 7"
    assert [r.exit.exit_code for r in failed if r.WhichOneof("record_type") == "exit"] == [1]


def test_a_trial_that_waits_ends_its_run_and_goes_on_in_it(tmp_path: Path) -> None:
    run, space = tmp_path / "digits", small_space()
    lines = list(events(space))
    second = [i for i, e in enumerate(lines) if e.get("trial") == "t0001" and e["event"] == "epoch"][1]
    waits = {"event": "waiting", "trial": "t0001", "reason": "2 of 2 at rung 1"}
    rung = {"event": "rung", "trial": "t0001", "epoch": 1, "promoted": True}
    third = next(i for i, e in enumerate(lines) if e.get("trial") == "t0003" and e["event"] == "stopped")
    lines[third:third] = [{**waits, "trial": "t0003"}]
    follow(run, [*lines[:second], waits, rung, *lines[second:]])
    history = [
        values(r.history.item) for r in tracked(run)["digits study"][1] if r.WhichOneof("record_type") == "history"
    ]
    assert max(row.get("trials_waiting", 0) for row in history) == 1
    assert (history[-1]["trials_waiting"], history[-1]["trials_stopped"], history[-1]["trials_completed"]) == (0, 1, 4)
    summary = {key: v for r in tracked(run)["digits t0003"][1] for key, v in values(r.summary.update).items()}
    assert summary["status"] == "waiting"  # not opened again to say that it waited to the end


def test_resumed_study_keeps_its_points_and_group(tmp_path: Path) -> None:
    run, space = tmp_path / "digits", small_space()
    lines = list(events(space))
    half = next(i for i, e in enumerate(lines) if e.get("trial") == "t0005")
    write_run(run, space, lines[: half + 2])  # trial 5 was training when the driver died
    tracker = Tracker(space.to_dict(), str(run))
    for event in lines[half + 2 :]:
        tracker.event(event)
    tracker.close()
    assert tracker.failures == 0
    assert len(tracker.points) == 12
    assert values(tracked(run)["digits t0005"][0].config.update)["threat"]["epsilon"] == 0.1
    first = tmp_path / "first"
    write_run(first, space, lines[:1])
    begun = Tracker(space.to_dict(), str(first))
    begun.close()
    assert begun.group == tracker.group


def test_failing_calls_are_logged_and_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: Any) -> Any:
        raise RuntimeError("no W&B today")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = follow(tmp_path / "digits", list(events(small_space())))
    assert tracker.failures == 1  # without a study run there is nothing to send to
    assert "no W&B today" in (tmp_path / "digits/wandb/tracking.log").read_text()


def test_hanging_call_ends_tracking_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.2)
    never = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: never.wait())
    tracker = follow(tmp_path / "digits", list(events(small_space())))
    assert tracker.failures == 1
    assert "tracking ends here" in (tmp_path / "digits/wandb/tracking.log").read_text()
    never.set()


def test_folder_that_is_no_run_only_disables_tracking(tmp_path: Path) -> None:
    tracker = Tracker(small_space().to_dict(), str(tmp_path / "nothing"))
    tracker.event({"event": "failed", "trial": "t0001", "error": "x"})
    tracker.close()
    assert (tracker.mode, tracker.failures) == ("disabled", 1)


def test_nothing_is_written_when_disabled(tmp_path: Path) -> None:
    follow(tmp_path / "digits", list(events(small_space())), mode="disabled")
    assert not list((tmp_path / "digits").glob("wandb/*"))


def test_server_that_refuses_leaves_the_files_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    true = wandb.init

    def impatient(*, settings: wandb.Settings, **rest: Any) -> Any:
        """Only the server is given up soon."""
        return true(
            settings=settings.model_copy(update={"init_timeout": 2.0} if rest["mode"] == "online" else {}), **rest
        )

    monkeypatch.setattr(wandb, "init", impatient)
    run = tmp_path / "digits"
    tracker = follow(run, list(events(small_space())), mode="auto")
    assert "could not go online" in (run / "wandb/tracking.log").read_text()
    assert tracker.failures == 0
    assert set(tracked(run)) >= {"digits study", "digits t0006"}


def test_mode_without_key_or_network_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, silent_server: str
) -> None:
    assert choose_mode("auto") == choose_mode("online")
    assert choose_mode("auto").mode == "offline"
    assert choose_mode("auto").why.startswith("no key for api.wandb.ai")
    assert choose_mode("disabled").mode == "disabled"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert choose_mode("auto") == choose_mode("online") == State("online")
    assert choose_mode("offline") == State("offline", "as wandb.mode: offline asks")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("auto") == State("offline", "as WANDB_MODE=offline asks")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setattr(tracking, "REACH_SECONDS", 0.3)
    assert choose_mode("auto") == State("offline", f"{silent_server} did not answer within 0.3 s")
    assert not is_reachable("not a url", 0.3)


def test_key_may_stand_in_netrc(tmp_path: Path) -> None:
    assert not has_key("api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key("api.wandb.ai")
    assert not has_key("wandb.example")
    (tmp_path / "netrc").write_text("this is no netrc")
    assert not has_key("api.wandb.ai")


def test_importing_tracking_imports_neither_wandb_nor_ray_nor_torch() -> None:
    names = "('wandb', 'ray', 'torch')"  # its process stands beside every search
    program = f"import sys, cactus_ray.report.tracking_process; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout.strip() == "[]"
