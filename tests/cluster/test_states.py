"""Training that was broken off goes on from the last state that was kept, in another process or driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chaos import TRAINER, Search, adopting, below, leftovers, plain_network, wait_for
from tiny_study import REFERENCE, SPACE, space

from cactus_ray.cluster.driver import PREFIX, SCRATCH, DriverOptions, run_study, scratch
from cactus_ray.search.in_flight import FOLDER
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Event, Study

LONG = {
    "train": {"epochs": 12, "batch_size": 32}, "data": {"name": "digits"}, "model": {"name": "cnn_small"},
    "resources": {**SPACE["resources"], "state_seconds": 0.0},
}  # fmt: skip


@pytest.mark.ray
def test_a_training_process_that_is_killed_is_replaced_and_its_work_goes_on(tmp_path: Path) -> None:
    events: list[Event] = []

    def kill_once(event: Event) -> None:
        events.append(event)
        if event["event"] == "epoch" and event["epoch"] == 3 and not any(e["event"] == "died" for e in events):
            (trainer,) = [pid for pid, line in below(os.getpid()).items() if line.startswith(TRAINER)]
            os.kill(trainer, signal.SIGKILL)

    study = Study(space(**LONG), RunStore(tmp_path), Records(), list(range(40)), [kill_once])
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=2))
    (trial,) = read_records(tmp_path).trials.values()
    assert (trial.status, trial.deaths) == ("completed", {max(trial.deaths): 1})
    first, second = [e["epoch"] for e in events if e["event"] == "begun"]
    assert first == 0
    assert second >= 1
    assert trial.sha256 == plain_network(trial.config)
    assert trial.worked > float(trial.train_seconds or 0.0) > 0
    assert list((tmp_path / FOLDER).iterdir()) == []


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("execution", ["direct", pytest.param("train", marks=pytest.mark.slow)])
def test_under_a_new_driver_training_goes_on_and_gives_the_same_network(tmp_path: Path, execution: str) -> None:
    resources = {**LONG["resources"], "execution": execution}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**SPACE, **LONG, "resources": resources, "wandb": {"mode": "disabled"}}))
    run, storage = tmp_path / "runs" / "tiny", tmp_path / "storage"
    main = "from cactus_ray.cli import main; main()"
    options = ["--runs", str(run.parent), "--storage", str(storage)]
    search = Search([sys.executable, "-c", main, "search", str(file), *options], tmp_path / "log")
    with adopting():
        search.start()
        assert wait_for(lambda: any((run / FOLDER).glob("t0001-*.safetensors")), 200), search.log.read_text()
        search.kill_driver(signal.SIGKILL)
        assert leftovers() == {}
    assert read_records(run).trials["t0001"].status == "running"
    assert len(list(storage.iterdir())) == 1
    subprocess.run([*search.command[:4], "--resume", "tiny", *options], check=True, capture_output=True, timeout=300)
    (trial,) = read_records(run).trials.values()
    begun = [line for line in (run / "trials.jsonl").read_text().splitlines() if '"begun"' in line]
    assert '"epoch":0' in begun[0]
    assert '"epoch":0' not in begun[-1]
    assert len(begun) == 2
    assert trial.status == "completed"
    assert trial.sha256 == plain_network(trial.config)
    assert list((run / FOLDER).iterdir()) == []
    assert list(storage.iterdir()) == []


def test_scratch_files_of_a_driver_that_was_killed_go_with_the_next_one(tmp_path: Path) -> None:
    run, storage = tmp_path / "run", tmp_path / "storage"
    run.mkdir()
    killed = scratch(run, str(storage))
    left = killed.__enter__()
    (left / "tune").mkdir()
    with scratch(run, str(storage)) as folder:
        assert list(storage.iterdir()) == [folder]
    assert list(storage.iterdir()) == []
    assert list(run.iterdir()) == []
    foreign = storage / f"{PREFIX}other"
    foreign.mkdir()
    (foreign / SCRATCH).write_text(str(tmp_path / "another run"))
    (run / SCRATCH).write_text(str(foreign))  # whatever stands there: it is not ours
    with scratch(run, str(storage)):
        pass
    assert foreign.is_dir()
