"""The process through which trials report dies: the search ends with one line, and goes on where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from chaos import below
from tiny_study import REFERENCE, SPACE, space

from cactus_ray.cluster import driver
from cactus_ray.cluster.desk import Desk
from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.cluster.mailbox import LOST
from cactus_ray.errors import RunFailedError
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Event, Study

TITLE = "ray::Mailbox"


def kill_mailbox() -> None:
    (pid,) = [pid for pid, title in below(os.getpid()).items() if title.startswith(TITLE)]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
def test_a_search_that_loses_its_mailbox_ends_with_one_line_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It dies while the second trial trains, which would go on for days; the third driver has the records of both."""
    places: list[tuple[str, str]] = []
    opened = driver.open_mailbox

    def placed(node: str) -> Any:
        places.append((node, ray.get_runtime_context().get_node_id()))
        return opened(node)

    monkeypatch.setattr(driver, "open_mailbox", placed)

    def kill(event: Event) -> None:
        if event["event"] == "epoch" and event["trial"] == "t0002":
            kill_mailbox()

    parameters = {**SPACE["parameters"], "train.epochs": {"values": [2, 1_000_000]}}
    tiny = space(
        parameters=parameters,
        search={"trials": 2, "concurrency": 1, "points": [{"train.epochs": 2}, {"train.epochs": 1_000_000}]},
        resources={"state_seconds": 0.0},
    )
    study = Study(tiny, RunStore(tmp_path), Records(), list(range(40)), [kill])
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    with pytest.raises(RunFailedError) as found:
        run_study(study, DriverOptions(cpus=2))
    assert str(found.value) == LOST
    assert found.value.exit_status == 1
    assert "Traceback" not in "".join(capfd.readouterr())
    assert [driver_node == mailbox_node for driver_node, mailbox_node in places] == [True]
    records = read_records(tmp_path)
    assert records.finished is not None
    assert records.finished["status"] == "failed"
    assert [trial.status for trial in records.trials.values()] == ["completed", "running"]
    told: list[Event] = []

    def enough(event: Event) -> None:
        told.append(event)
        if event["event"] == "epoch":
            raise KeyboardInterrupt  # the listener is called by the desk

    again = Study(tiny, RunStore(tmp_path), records, list(range(40)), [enough])
    with pytest.raises(KeyboardInterrupt):
        run_study(again, DriverOptions(cpus=2))
    assert [event["trial"] for event in told if event["event"] == "begun"] == ["t0002"]
    assert next(event["epoch"] for event in told if event["event"] == "begun") >= 1  # its state was kept


@pytest.mark.parametrize("call", ["next_configuration", "trainer_ended"])
def test_what_tune_asks_for_ends_in_order_without_a_mailbox(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def dead(_: Any) -> Any:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", dead)
    silent = SimpleNamespace(remote=lambda *_: None)
    start = SimpleNamespace(id="t0001", attempt=2, state=b"state")
    study: Any = SimpleNamespace(done=False, training={}, in_flight=0, next_trial=lambda: start)
    shares: Any = SimpleNamespace(training=1, in_flight=2)
    pool: Any = SimpleNamespace(broker=SimpleNamespace(full=False))
    desk = Desk(study, shares, pool, SimpleNamespace(hand=silent, take=silent))
    if call == "trainer_ended":
        desk.trainer_ended("t0001", error=True)
    assert desk.next_configuration(0.0) == "finished"
    assert isinstance(desk.error, RunFailedError)
    assert str(desk.error) == LOST
