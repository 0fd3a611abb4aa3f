"""States of trials under way: what is kept of them, and which are believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from course import SPACE, begin, resume, started

from cactus_ray.config import RunConfig
from cactus_ray.data import load
from cactus_ray.models.network import pack
from cactus_ray.search.attempts import DEATHS
from cactus_ray.search.in_flight import FOLDER, Kept, forget_states, keep_state, kept_state
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.training.loop import EpochReport, train

TINY = {
    **SPACE, "data": {"name": "digits", "train_samples": 128}, "model": {"name": "mlp", "hidden": [8]},
    "train": {"epochs": 4, "batch_size": 64}, "parameters": {**SPACE["parameters"], "method": {"value": "ibp"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> Space:
    return parse_space(TINY, "tiny.yaml")


def trained(config: RunConfig, state: bytes | None = None) -> tuple[bytes, dict[int, bytes]]:
    """The network that comes out, and the state after every epoch."""
    states: dict[int, bytes] = {}

    def report(epoch: EpochReport) -> bool:
        states[epoch.epoch] = epoch.save()
        return True

    data = load(config.data, ("train", "selection"))
    return pack(train(config, data, report=report, state=state).network), states


@pytest.fixture(scope="module")
def whole(space: Space) -> tuple[RunConfig, bytes, dict[int, bytes]]:
    torch.set_num_threads(1)
    config = space.configuration({"learning_rate": 0.005}, 1)
    return config, *trained(config)


def names(run: Path) -> list[str]:
    return sorted(file.name.rsplit("-", 1)[0] for file in (run / FOLDER).iterdir())


def test_the_newest_state_is_kept_alone_and_others_are_left_alone(whole: Any, tmp_path: Path) -> None:
    config, _, states = whole
    for epoch in (1, 2):
        keep_state(tmp_path, "t0001", epoch, states[epoch])
    keep_state(tmp_path, "t0002", 1, states[1])
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    assert names(tmp_path) == ["notes.txt", "t0001-2", "t0002-1"]
    assert kept_state(tmp_path, "t0001", config) == Kept(2, states[2])
    assert kept_state(tmp_path, "t0003", config) == Kept()
    (tmp_path / FOLDER / f".t0002-3-{'0' * 64}.safetensors.tmp").write_bytes(b"half")
    forget_states(tmp_path, {"t0002"})
    assert names(tmp_path) == ["notes.txt", "t0002-1"]


def test_a_state_that_is_torn_changed_or_of_another_run_is_passed_over_and_said(whole: Any, tmp_path: Path) -> None:
    config, _, states = whole
    keep_state(tmp_path, "t0001", 1, states[1])
    (old,) = (tmp_path / FOLDER).iterdir()
    data = old.read_bytes()
    keep_state(tmp_path, "t0001", 2, states[2])
    (new,) = (tmp_path / FOLDER).iterdir()
    old.write_bytes(data)
    for spoilt in (states[2][:-1], states[2][:-1] + bytes([states[2][-1] ^ 1]), b""):
        new.write_bytes(spoilt)
        kept = kept_state(tmp_path, "t0001", config)
        assert (kept.epoch, kept.data) == (1, states[1])
        assert kept.notes == (f"{FOLDER}/{new.name} is passed over: its content is not what was written",)
    keep_state(tmp_path, "t0001", 3, b"no state at all")
    assert "not a training state" in kept_state(tmp_path, "t0001", config).notes[0]
    keep_state(tmp_path, "t0001", 3, states[2])
    assert "it is of epoch 2 of 4" in kept_state(tmp_path, "t0001", config).notes[0]
    other = parse_space({**TINY, "train": {"epochs": 5, "batch_size": 64}}, "tiny.yaml")
    keep_state(tmp_path, "t0001", 2, states[2])
    foreign = kept_state(tmp_path, "t0001", other.configuration({"learning_rate": 0.005}, 1))
    assert (foreign.epoch, foreign.data) == (0, None)
    assert f"it is of the configuration {config.config_hash}" in foreign.notes[0]


def test_the_next_driver_goes_on_from_the_state_and_gets_the_same_network(space: Space, tmp_path: Path) -> None:
    first = begin(space, tmp_path)
    start = started(first)
    assert (start.epoch, start.state, start.attempt) == (0, None, 1)
    network, states = trained(start.config)
    first.begun(start.id, 0)
    for epoch in (1, 2, 3):
        first.epoch(start.id, epoch, 4, {"seconds": 1.0})
    first.saved(start.id, 2, states[2])

    second = resume(space, tmp_path)
    again = started(second)
    assert (again.id, again.config, again.epoch, again.state) == (start.id, start.config, 2, states[2])
    assert trained(again.config, again.state)[0] == network
    second.trained(start.id, {"last": network}, "last", 4, 4.0)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_without_a_state_that_can_be_used_it_is_trained_again(
    space: Space, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = begin(space, tmp_path)
    start = started(first)
    first.saved(start.id, 2, b"torn")
    second = resume(space, tmp_path)
    again = started(second)
    assert (again.epoch, again.state) == (0, None)
    assert "passed over" in caplog.text
    second.begun(again.id, 0)
    assert '"epoch":0,"notes":["in_flight/t0001-2-' in (tmp_path / "trials.jsonl").read_text()
    second.stopped(again.id, "asked to")
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_states_of_trials_that_are_not_under_way_go(space: Space, tmp_path: Path) -> None:
    first = begin(space, tmp_path)
    ended, open_ = started(first), started(first)
    first.failed(ended.id, "no")
    for trial in (ended, open_):
        keep_state(tmp_path, trial.id, 1, b"state")  # as if the driver was killed before it deleted the one
    resume(space, tmp_path)
    assert names(tmp_path) == [f"{open_.id}-1"]


def test_a_process_that_dies_is_replaced_until_too_many_died_before_the_same_epoch(
    space: Space, tmp_path: Path
) -> None:
    study = begin(space, tmp_path)
    start = started(study)
    for attempt in range(2, DEATHS + 1):
        study.died(start.id, "killed")
        again = started(study)
        assert (again.id, again.config, again.attempt) == (start.id, start.config, attempt)
    study.epoch(start.id, 1, 4, {"seconds": 1.0})  # there is progress: it is not the trial that kills
    study.died(start.id, "killed")
    assert started(study).id == start.id
    study = resume(space, tmp_path)  # what died before is not forgotten
    for _ in range(DEATHS - 1):
        assert started(study).id == start.id
        study.died(start.id, "killed")
    record = read_records(tmp_path).trials[start.id]
    assert (record.status, record.error) == ("failed", f"killed, {DEATHS} times in epoch 2")
    assert record.deaths == {0: DEATHS - 1, 1: DEATHS}
