"""One of a trial's two workers dies: both begin again from the last state, and the network is as if nothing was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from chaos import below
from test_kept_workers import WORKER
from test_states import LONG
from tiny_study import REFERENCE, space

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.search.in_flight import FOLDER
from cactus_ray.search.records import TrialRecord
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Event, Study

EPOCHS = 16
RUN = {
    **LONG, "data": {"name": "digits", "train_samples": 512}, "train": {"epochs": EPOCHS, "batch_size": 32},
    "resources": {**LONG["resources"], "workers": 2},
}  # fmt: skip


class Watch:
    """Notes where training begins and in which processes, and kills one of these in each of the first ``deaths`` teams.

    The first dies after epoch 3, the second after the first epoch of its team; the oldest process, then the newest: who
    is rank 0, which alone mails and keeps states, is up to Ray Train.
    """

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.killed: list[int] = []
        self.begun: list[int] = []
        self.teams: list[set[int]] = []

    def __call__(self, event: Event) -> None:
        if event["event"] == "begun":
            self.begun.append(event["epoch"])
            self.teams.append(workers())
        alive = len(self.killed) < min(self.deaths, len(self.teams))
        if event["event"] == "epoch" and alive and event["epoch"] >= 3:
            victim = (max if self.killed else min)(self.teams[-1])
            self.killed.append(victim)
            os.kill(victim, signal.SIGKILL)


def workers() -> set[int]:
    return {pid for pid, title in below(os.getpid()).items() if title.startswith(WORKER)}


def trained(folder: Path, watch: Watch) -> TrialRecord:
    """The one trial of a study whose trials have two workers."""
    study = Study(space(**RUN), RunStore(folder), Records(), list(range(40)), [watch])
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=4))
    (trial,) = read_records(folder).trials.values()
    assert list((folder / FOLDER).iterdir()) == []
    return trial


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_of_two_workers_is_killed_twice_and_the_network_is_the_same(tmp_path: Path) -> None:
    calm, disturbed = Watch(0), Watch(2)
    expected, found = trained(tmp_path / "calm", calm), trained(tmp_path / "disturbed", disturbed)
    assert (calm.begun, calm.killed) == ([0], [])
    assert [trial.status for trial in (expected, found)] == ["completed", "completed"]
    first, second, third = disturbed.begun
    assert first == 0
    assert 2 <= second <= third < EPOCHS  # from the last state before each death, not from the start
    assert [len(team) for team in disturbed.teams] == [2, 2, 2]
    assert len(set.union(*disturbed.teams)) == 6  # the one that survived ends, too: it waits for the dead one
    assert len(disturbed.killed) == 2
    assert found.config_hash == expected.config_hash
    assert found.sha256 == expected.sha256  # two workers add up their gradients in one order: the same bytes
    assert [e["metrics"]["loss"] for e in found.epochs] == [e["metrics"]["loss"] for e in expected.epochs]
    assert workers() == set()
