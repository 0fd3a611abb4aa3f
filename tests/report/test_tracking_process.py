"""The process that talks to W&B has the driver's keys, says where the study goes, and never holds up the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from studies import events, small_space, write_run

from cactus_ray.report import tracking_process
from cactus_ray.report.tracking import LOG, State
from cactus_ray.report.tracking_process import TrackingProcess, sync_line, tracking, words

KEY = "f00d" * 10
STAND_IN = Path(__file__).parent / "stand_in"


class Said:
    """Lines for the terminal; ``until`` waits for one that holds a text, as long as the test may take."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.changed = threading.Condition()

    def __call__(self, line: str) -> None:
        with self.changed:
            self.lines.append(line)
            self.changed.notify_all()

    def until(self, text: str) -> str:
        with self.changed:
            self.changed.wait_for(lambda: any(text in line for line in self.lines))
            return next(line for line in self.lines if text in line)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> Path:
    """The process finds the stand-in instead of W&B, a key and a server that answers; the log of the calls."""
    for name in ("WANDB_MODE", "STAND_IN"):
        monkeypatch.delenv(name, raising=False)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(STAND_IN), before))))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    return tmp_path / "calls"


def calls(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def begun(run: Path, mode: str = "auto") -> tuple[Any, list[dict[str, Any]]]:
    """The space and the events of a study, whose first event is on disk."""
    space = small_space(mode=mode)
    lines = list(events(space))
    write_run(run, space, lines[:1])
    return space, lines


def test_online_the_process_has_the_key_and_the_page_is_said_at_start_and_end(tmp_path: Path, stand_in: Path) -> None:
    run, said = tmp_path / "digits", Said()
    space, lines = begun(run)
    with tracking(space, run, said) as listener:
        assert listener is not None
        for event in lines:
            listener(event)
    found = calls(stand_in)
    study = found[0]["run"]
    assert [call["call"] for call in found[:1] + found[-1:]] == ["init", "teardown"]
    assert {call["key"] for call in found} == {KEY}
    assert {call["pid"] for call in found} != {os.getpid()}
    assert len({call["pid"] for call in found}) == 1
    assert [call["mode"] for call in found if call["call"] == "init"] == ["online"] * 7  # the study and six trials
    assert said.lines == [f"W&B: online: https://wandb.example/somebody/tests/runs/{study}"] * 2
    assert not (run / LOG).exists()  # nothing went wrong


def test_offline_is_said_with_the_reason_and_the_line_that_uploads(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run, said = tmp_path / "my digits", Said()
    space, lines = begun(run)
    with tracking(space, run, said) as listener:
        assert listener is not None
        for event in lines[:3]:
            listener(event)
    why = "no key for 127.0.0.1: set WANDB_API_KEY, or run wandb login"
    assert said.lines == [f"W&B: offline ({why}); upload with: {sync_line(run)}"] * 2
    assert str(sync_line(run)).endswith(f"wandb sync '{run}/wandb'")


def test_a_server_that_refuses_a_run_is_named(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "refuses")
    run, said = tmp_path / "digits", Said()
    with tracking(begun(run)[0], run, said):
        line = said.until("offline")
    assert "W&B could not begin a run online: permission denied); upload with:" in line
    assert "and much more" in (run / LOG).read_text()


def test_a_process_that_dies_is_said_and_the_search_goes_on(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "dies")
    run, said = tmp_path / "digits", Said()
    space, lines = begun(run)
    process = TrackingProcess(space.to_dict(), run, said)
    for event in lines:
        process.send(event)
    assert "its process died (status 7), the search goes on" in said.until("died")
    assert process.process.returncode == 7  # buried by now: no zombie
    for event in lines:
        process.send(event)
    process.close(60.0)
    assert [thread.is_alive() for thread in process.threads] == [False, False]


def test_a_process_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "hangs")
    monkeypatch.setattr(tracking_process, "QUEUED", 5)
    run, said = tmp_path / "digits", Said()
    space, lines = begun(run)
    process = TrackingProcess(space.to_dict(), run, said)
    os.kill(process.process.pid, signal.SIGSTOP)  # it does not even read
    large = {**lines[1], "config": {"padding": "x" * 1_000_000}}  # more than a pipe holds
    for _ in range(20):
        process.send(large)
    assert process.lost
    process.close(0.1)
    assert process.process.returncode == -signal.SIGKILL
    assert [thread.is_alive() for thread in process.threads] == [False, False]
    assert [text in line for text, line in zip(("hangs", "not finished within 0.1 s"), said.lines, strict=True)] == [
        True,
        True,
    ]


def test_ctrl_c_is_for_the_driver_alone_and_the_end_of_the_driver_is_the_end(tmp_path: Path, stand_in: Path) -> None:
    run, said = tmp_path / "digits", Said()
    space, lines = begun(run)
    process = TrackingProcess(space.to_dict(), run, said)
    said.until("online")
    assert os.getsid(process.process.pid) == process.process.pid  # the terminal's Ctrl-C goes to the driver's session
    for number in (signal.SIGINT, signal.SIGTERM):  # and what is sent to all processes of a job is not heeded
        os.kill(process.process.pid, number)
    for event in lines[:3]:
        process.send(event)
    process.waiting.put(None)  # as when the driver is killed: the pipe ends, and nobody waits
    assert process.process.wait() == 0
    assert [call["call"] for call in calls(stand_in)][-1] == "teardown"
    process.close(60.0)


def test_a_process_that_cannot_start_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    run, said = tmp_path / "digits", Said()
    with tracking(begun(run)[0], run, said) as listener:
        assert listener is None
    assert "did not start ([Errno 11] Resource temporarily unavailable)" in said.lines[0]


def test_tracking_that_is_off_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    said = Said()
    with tracking(begun(tmp_path / "digits", mode="disabled")[0], tmp_path / "digits", said) as listener:
        assert listener is None
    assert said.lines == []


def test_only_what_was_not_uploaded_is_offered(tmp_path: Path) -> None:
    assert sync_line(tmp_path) is None
    assert words(State("offline", "no key"), tmp_path) == "W&B: offline (no key)"
    file = tmp_path / "wandb" / "offline-run-1" / "run-1.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    assert str(sync_line(tmp_path)).endswith(f"wandb sync {tmp_path}/wandb")
    since = State("offline", "the server is gone", "https://wandb.example")
    expected = (
        f"W&B: offline (the server is gone); until then: https://wandb.example; upload with: {sync_line(tmp_path)}"
    )
    assert words(since, tmp_path) == expected
    file.with_suffix(".wandb.synced").touch()
    assert sync_line(tmp_path) is None
    assert words(State("disabled", "as WANDB_MODE=disabled asks"), tmp_path) == "W&B: off (as WANDB_MODE=disabled asks)"
