"""States of trials under way: what is kept of them, and which are believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from course import SPACE, begin, resume, started

from cactus_ray.config import RunConfig
from cactus_ray.data import load
from cactus_ray.models.network import pack
from cactus_ray.search.attempts import DEATHS
from cactus_ray.search.in_flight import FOLDER, Kept, States
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
    config, _, data = whole
    states = States(tmp_path)
    for epoch in (1, 2):
        states.keep("t0001", epoch, data[epoch])
    states.keep("t0001", 2, data[2])  # delivered again
    states.keep("t0002", 1, data[1])
    foreign = ["notes.txt", "t0001-notes.txt", "t0001-2.safetensors", f"t0001-2-{'0' * 64}.safetensors.bak"]
    for name in foreign:
        (tmp_path / FOLDER / name).write_text("mine")
    for later in (states, States(tmp_path)):
        assert later.kept("t0001", config) == Kept(2, data[2])
        assert later.kept("t0003", config) == Kept()
        assert later.files.keys() == {"t0001", "t0002"}
    (tmp_path / FOLDER / f".t0002-3-{'0' * 64}.safetensors.tmp").write_bytes(b"half")
    assert len(list((tmp_path / FOLDER).iterdir())) == len(foreign) + 3
    states = States(tmp_path)
    states.forget_others({"t0002"})
    (left,) = {file.name for file in (tmp_path / FOLDER).iterdir()} - {*foreign}
    assert left.startswith("t0002-1-")
    states.forget("t0002")
    states.forget("t0002")
    assert {file.name for file in (tmp_path / FOLDER).iterdir()} == {*foreign}


def test_names_of_trials_may_hold_what_separates_the_parts_of_a_file(whole: Any, tmp_path: Path) -> None:
    config, _, data = whole
    for trial, epoch in (("t1", 1), ("t1-2", 2), ("t1-2-3", 3)):
        States(tmp_path).keep(trial, epoch, data[epoch])
    states = States(tmp_path)
    assert [states.kept(trial, config).epoch for trial in ("t1", "t1-2", "t1-2-3")] == [1, 2, 3]
    states.forget("t1")
    states.forget_others({"t1-2"})
    assert names(tmp_path) == ["t1-2-2"]


@pytest.mark.parametrize("moment", ["while it is written", "before it has its name", "before the older one goes"])
def test_a_driver_that_dies_while_it_keeps_a_state_leaves_one_that_is_whole(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config, _, data = whole
    states = States(tmp_path)
    states.keep("t0001", 1, data[1])

    def dies(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    what = {"while it is written": (os, "fsync"), "before it has its name": (Path, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*what.get(moment, (Path, "unlink")), dies)
        with pytest.raises(KeyboardInterrupt):
            states.keep("t0001", 2, data[2])
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    expected = Kept(2, data[2]) if moment == "before the older one goes" else Kept(1, data[1])
    later = States(tmp_path)
    assert later.kept("t0001", config) == expected
    later.forget_others({"t0001"})
    assert later.kept("t0001", config) == expected
    assert not list((tmp_path / FOLDER).glob(".*"))
    kept = states.kept("t0001", config)  # the same one, too, if it goes on all the same, and says what it misses
    assert (kept.epoch, kept.data) == (expected.epoch, expected.data)
    assert [note.endswith("it is not there") for note in kept.notes] == [True] * (expected.epoch == 1)
    for driver in (states, later):
        driver.keep("t0001", 3, data[3])
        assert names(tmp_path) == ["t0001-3"]
        assert driver.kept("t0001", config) == Kept(3, data[3])
    states.forget("t0001")
    assert names(tmp_path) == []


def test_drivers_one_after_the_other_keep_one_state_and_what_is_lost_is_said(whole: Any, tmp_path: Path) -> None:
    config, _, data = whole
    for epoch in (1, 2, 3):
        states = States(tmp_path)
        states.forget_others({"t0001"})
        assert states.kept("t0001", config).epoch == epoch - 1
        states.keep("t0001", epoch, data[epoch])
        assert names(tmp_path) == [f"t0001-{epoch}"]
    (file,) = (tmp_path / FOLDER).iterdir()
    file.unlink()
    assert states.kept("t0001", config) == Kept(notes=(f"{FOLDER}/{file.name} is passed over: it is not there",))
    assert States(tmp_path).kept("t0001", config) == Kept()
    states.forget("t0001")


def test_a_state_that_is_torn_changed_or_of_another_run_is_passed_over_and_said(whole: Any, tmp_path: Path) -> None:
    config, _, data = whole
    states = States(tmp_path)
    states.keep("t0001", 1, data[1])
    (old,) = (tmp_path / FOLDER).iterdir()
    states.keep("t0001", 2, data[2])
    (new,) = (tmp_path / FOLDER).iterdir()
    old.write_bytes(data[1])
    states = States(tmp_path)
    for spoilt in (data[2][:-1], data[2][:-1] + bytes([data[2][-1] ^ 1]), b""):
        new.write_bytes(spoilt)
        kept = states.kept("t0001", config)
        assert (kept.epoch, kept.data) == (1, data[1])
        assert kept.notes == (f"{FOLDER}/{new.name} is passed over: its content is not what was written",)
    states.keep("t0001", 3, b"no state at all")
    assert "not a training state" in states.kept("t0001", config).notes[0]
    states.keep("t0001", 3, data[2])
    assert "it is of epoch 2 of 4" in states.kept("t0001", config).notes[0]
    other = parse_space({**TINY, "train": {"epochs": 5, "batch_size": 64}}, "tiny.yaml")
    states.keep("t0001", 2, data[2])
    foreign = states.kept("t0001", other.configuration({"learning_rate": 0.005}, 1))
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
        States(tmp_path).keep(trial.id, 1, b"state")  # as if the driver was killed before it deleted the one
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
