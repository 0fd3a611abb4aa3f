"""Ray Train's worker processes between trials: kept, replaced where they died, and nobody's resources."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import below, plain_network
from test_ray_train import free_cpus
from tiny_study import REFERENCE, space

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Event, Study

WORKER = "ray::RayTrainWorker"


def workers() -> list[int]:
    return [pid for pid, title in below(os.getpid()).items() if title.startswith(WORKER)]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_worker_serves_trial_after_trial_until_it_dies(tmp_path: Path) -> None:
    """Killed once in the middle of the second trial, and once between the third and the fourth; the fifth one fails."""
    began: list[tuple[str, int, int]] = []
    between: list[tuple[float, int]] = []
    due = [("epoch", "t0002", 5), ("started", "t0004", None)]
    killed: list[int] = []
    points = [{"learning_rate": 0.001 * i, "train.l1": 1e38 if i == 5 else 0.0} for i in range(1, 7)]

    def watch(event: Event) -> None:
        if event["event"] == "begun":
            (pid,) = workers()
            began.append((event["trial"], event["epoch"], pid))
        elif event["event"] == "started" and began:
            between.append((free_cpus(1.0), len(workers())))
        if due and (event["event"], event.get("trial"), event.get("epoch")) == due[0]:
            due.pop(0)
            killed.extend(workers())
            os.kill(killed[-1], signal.SIGKILL)

    tiny = space(
        train={"epochs": 10, "batch_size": 32},
        search={"trials": 6, "sampler": "random", "points": points},
        parameters={
            "method": {"value": "ibp"}, "learning_rate": {"min": 0.001, "max": 0.01},
            "train.l1": {"values": [0.0, 1e38]},
        },
        resources={"execution": "train"},
    )  # fmt: skip
    study = Study(tiny, RunStore(tmp_path), Records(), list(range(40)), [watch])
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=2))
    trials = read_records(tmp_path).trials
    assert [t.status for t in trials.values()] == [*["completed"] * 4, "failed", "completed"]
    assert "not finite at step" in str(trials["t0005"].error)
    first, second = killed
    third = began[-1][2]
    assert len({first, second, third}) == 3
    pids = [first, first, second, second, third, third, third]
    names = ["t0001", "t0002", "t0002", "t0003", "t0004", "t0005", "t0006"]
    assert [(trial, pid) for trial, _, pid in began] == list(zip(names, pids, strict=True))
    resumed = began[2][1]
    assert resumed >= 1  # from its last checkpoint
    assert [epoch for _, epoch, _ in began] == [0, 0, resumed, 0, 0, 0, 0]
    assert between == [(1.0, 1)] * 5  # an idle worker is there and holds nothing: one CPU is the verifier's
    for name in ("t0002", "t0006"):
        assert trials[name].sha256 == plain_network(trials[name].config)
    assert workers() == []


def test_a_ray_with_other_insides_keeps_nothing() -> None:
    """The Ray of today is known, and one that lacks what is needed runs its own way."""
    script = """
import importlib
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state
from cactus_ray.cluster import kept_workers, ray_train
print(kept_workers.USABLE, ray_train._Controller.worker_group_cls is WorkerGroup)
del state._shutdown_workers
importlib.reload(kept_workers)
importlib.reload(ray_train)
print(kept_workers.USABLE, ray_train._Controller.worker_group_cls is WorkerGroup)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[-3:] == ["True False", "False True", ""]
