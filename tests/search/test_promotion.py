"""Trials of a study that wait at a rung: who goes on from where, what is recorded, and what outlives a driver."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from course import SPACE, begin, result, resume, started

from cactus_ray.config import RunConfig
from cactus_ray.data import load
from cactus_ray.errors import ConfigError
from cactus_ray.models.network import pack
from cactus_ray.search.explain import explain
from cactus_ray.search.halving import replayed
from cactus_ray.search.in_flight import FOLDER
from cactus_ray.search.rungs import Rungs, proxy_goals
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, read_records
from cactus_ray.search.study import Study, TrialStart
from cactus_ray.training.loop import EpochReport, train

EPOCHS = 5
NAMES = tuple(proxy_goals(["dense", "int8"]))
SEARCH = {"trials": 6, "sampler": "random", "scheduler": {"name": "asha"}}


def space_of(search: dict[str, Any] | None = None, **changes: Any) -> Space:
    tiny = {
        **SPACE, "data": {"name": "digits", "train_samples": 128}, "model": {"name": "mlp", "hidden": [8]},
        "train": {"epochs": EPOCHS, "batch_size": 64},
        "parameters": {**SPACE["parameters"], "method": {"value": "ibp"}},
    }  # fmt: skip
    return parse_space({**tiny, "search": {**SEARCH, **(search or {})}, **changes}, "promotion.yaml")


@pytest.fixture
def space() -> Space:
    return space_of()


def metrics(value: float | None) -> dict[str, Any]:
    return {"seconds": 1.0, **dict.fromkeys(NAMES, value)}


def value_of(number: int, epoch: int) -> float:
    """What a made-up trial measures; who leads changes between the rungs."""
    return random.Random(f"{number}/{epoch}").random()


class Driver:
    """One place for training, and verifiers that answer at once. ``step`` does one thing."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.start: TrialStart | None = None
        self.epoch = 0

    def step(self) -> bool:
        """Whether there was anything to do."""
        if self.start is None:
            self.start = self.study.next_trial()
            if self.start is None:
                return False
            self.epoch = self.start.epoch
            self.study.begun(self.start.id, self.epoch)
        elif self.epoch == EPOCHS:
            for chunk in self.study.trained(self.start.id, {"last": b"network"}, "last", EPOCHS, 1.0 * EPOCHS):
                self.study.verified(result(chunk))
            self.start = None
        else:
            self.epoch += 1
            measured = metrics(value_of(self.start.number, self.epoch))
            if not self.study.epoch(self.start.id, self.epoch, EPOCHS, measured):
                self.epoch = -self.epoch  # its state is on the way
        return True

    def mail(self) -> None:
        """Take what the training process sent, if it ended."""
        if self.start is not None and self.epoch < 0:
            self.study.waits(self.start.id, -self.epoch, b"state", float(-self.epoch))
            self.start = None


def played(study: Study) -> Iterator[Driver]:
    """A whole study; yields before every step, and before a state that is on its way arrives."""
    driver = Driver(study)
    while True:
        yield driver
        driver.mail()
        yield driver
        if not driver.step():
            return


def figures(run: Path) -> dict[str, Any]:
    trials = read_records(run).trials.values()
    return {t.id: (t.status, t.config_hash, len(t.epochs), [str(d) for d in t.rungs], t.error) for t in trials}


def test_a_trial_waits_is_promoted_before_new_ones_and_the_others_stop_at_the_end(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    drawn: list[tuple[int, int]] = []

    def count(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            first = [d for d in study.rungs.halving.decisions if d.rung == 1]
            drawn.append((len({d.trial for d in first}), len({d.trial for d in first if d.go_on})))

    study.listeners.append(count)
    seen: list[int] = []
    for driver in played(study):
        waiting = driver.study.waiting
        seen.append(len(waiting))
        assert {t.id for t in read_records(tmp_path).trials.values() if t.status == "waiting"} == set(waiting)
        if driver.start is None:
            assert {file.name.split("-")[0] for file in (tmp_path / FOLDER).glob("*")} == set(waiting)
    assert max(seen) > 3
    assert [came for came, _ in drawn] == list(range(6))
    assert all(went_on >= came // 3 for came, went_on in drawn)  # a third of those that came, before a new one
    assert drawn[3] == (3, 1)
    assert study.done
    records = read_records(tmp_path)
    # of six at the first rung two are the best share by the end, at least three go on; all three at the next
    assert sorted(t.status for t in records.trials.values()) == ["completed"] * 3 + ["stopped"] * 3
    assert study.finished == 6
    assert list((tmp_path / FOLDER).iterdir()) == []
    stopped = next(t for t in records.trials.values() if t.status == "stopped")
    assert stopped.error is not None
    assert stopped.error.endswith("at rung 1; it waited there until the search ended")
    assert (stopped.train_seconds, stopped.worked) == (1.0, 1.0)
    decisions = study.rungs.halving.decisions
    assert sorted(map(str, decisions)) == sorted(str(d) for t in records.trials.values() for d in t.rungs)
    assert sorted(map(str, replayed(study.rungs.halving.rules, decisions))) == sorted(map(str, decisions))


def test_no_trial_is_told_to_the_sampler_before_it_ends(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    told: list[tuple[int, str]] = []
    tell = study.sampler.tell
    study.sampler.tell = lambda number, *rest: told.append((number, rest[-1])) or tell(number, *rest)  # type: ignore[method-assign,func-returns-value]
    for driver in played(study):
        waiting = {driver.study.numbers[trial] for trial in driver.study.waiting}
        assert not waiting & {number for number, _ in told}
    assert sorted(number for number, _ in told) == [1, 2, 3, 4, 5, 6]
    assert sorted(status for _, status in told) == ["completed"] * 3 + ["stopped"] * 3


def test_a_driver_that_dies_at_any_moment_changes_nothing(space: Space, tmp_path: Path) -> None:
    steps = sum(1 for _ in played(begin(space, tmp_path / "through")))
    expected = figures(tmp_path / "through")
    for broken in range(1, steps, 3):
        run = tmp_path / f"broken{broken}"
        for number, driver in enumerate(played(begin(space, run)), 1):
            waiting = set(driver.study.waiting)
            if number == broken:
                break
        second = resume(space, run)
        late = {driver.start.id} if driver.epoch < 0 and driver.start is not None else set()
        assert set(second.waiting) == waiting | late  # what died between the answer and the state waits, too
        kept = {file.name.split("-")[0] for file in (run / FOLDER).glob("*")}
        assert waiting <= kept <= set(second.waiting) | {start.id for start in second.restart}
        for _ in played(second):
            pass
        assert second.done
        found = figures(run)
        for trial, (status, digest, epochs, rungs, error) in expected.items():
            assert found[trial][:2] == (status, digest)
            assert found[trial][3:] == (rungs, error)
            assert found[trial][2] == epochs


def trained(config: RunConfig, state: bytes | None = None, until: int = EPOCHS) -> tuple[bytes, bytes]:
    """The network that comes out, and the state after the last epoch."""
    states: list[bytes] = []

    def report(epoch: EpochReport) -> bool:
        states.append(epoch.save())
        return epoch.epoch < until

    data = load(config.data, ("train", "selection"))
    return pack(train(config, data, report=report, state=state).network), states[-1]


@pytest.mark.parametrize("lost", [False, True])
def test_a_promoted_trial_goes_on_bit_for_bit_or_from_its_start_with_the_same_answers(
    space: Space, tmp_path: Path, lost: bool
) -> None:
    torch.set_num_threads(1)
    study = begin(space, tmp_path)
    first = started(study)
    whole, _ = trained(first.config)
    _, state = trained(first.config, until=1)
    assert not study.epoch(first.id, 1, EPOCHS, metrics(0.9))
    study.waits(first.id, 1, state, 1.0)
    for worse in (0.2, 0.1):
        other = started(study)
        assert not study.epoch(other.id, 1, EPOCHS, metrics(worse))
        study.waits(other.id, 1, b"", 1.0)
    if lost:
        (file,) = (tmp_path / FOLDER).glob(f"{first.id}-*")
        file.unlink()
    again = started(study)
    assert (again.id, again.config, again.attempt) == (first.id, first.config, 2)
    assert again.epoch == (0 if lost else 1)
    assert read_records(tmp_path).trials[first.id].status == "running"
    assert study.epoch(first.id, 1, EPOCHS, metrics(0.0))  # the answer stands, whatever is measured now
    assert trained(again.config, again.state)[0] == whole


def test_a_trial_whose_proxies_are_not_finite_stops_for_good(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    for value in (float("nan"), None):
        trial = started(study)
        assert not study.epoch(trial.id, 1, EPOCHS, metrics(value))
        study.waits(trial.id, 1, b"state", 1.0)
    assert not study.waiting
    assert not (tmp_path / FOLDER).exists()
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["stopped", "stopped"]
    third = started(study)
    assert study.epoch(third.id, 1, EPOCHS, metrics(0.0))  # the only one of three that can be compared


def test_all_trials_can_fail_at_the_rung_and_the_search_ends(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    while (start := study.next_trial()) is not None:
        study.epoch(start.id, 1, EPOCHS, metrics(float("nan")))
        study.waits(start.id, 1, b"state", 1.0)
    assert study.done
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["stopped"] * 6


def test_a_process_that_dies_with_the_answer_leaves_a_trial_that_waits(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    start = started(study)
    study.saved(start.id, 1, b"state")
    assert not study.epoch(start.id, 1, EPOCHS, metrics(0.5))
    study.died(start.id, "killed")
    assert list(study.waiting) == [start.id]
    assert not study.restart
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert started(study).id != start.id


def test_hours_leave_those_that_wait_to_a_later_driver_and_a_plateau_stops_them(tmp_path: Path) -> None:
    limited = space_of({"max_hours": 1.0, "plateau": 1})
    study = begin(limited, tmp_path)
    for value in (0.9, 0.5, 0.4):
        start = started(study)
        study.epoch(start.id, 1, EPOCHS, metrics(value))
        study.waits(start.id, 1, b"", 1.0)
    study.budget.clock = lambda: study.budget.begun + 7200
    assert study.next_trial() is None
    assert study.done
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["waiting"] * 3
    study = resume(limited, tmp_path)
    study.budget.plateau.idle = 1  # as if a complete trial had brought nothing
    assert study.next_trial() is None
    assert study.done
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["stopped"] * 3


def test_a_limit_of_trials_does_not_keep_those_that_wait_from_going_on(tmp_path: Path) -> None:
    study = begin(space_of({"max_trials": 3}), tmp_path)
    for _ in played(study):
        pass
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["completed"] * 3


def test_the_rest_goes_on_where_a_limit_ends_it(tmp_path: Path) -> None:
    scheduler = {"name": "asha", "rest": "promote"}
    study = begin(space_of({"scheduler": scheduler, "max_hours": 1.0}), tmp_path)
    for _ in played(study):
        pass
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["completed"] * 6
    with pytest.raises(ConfigError, match=r"search\.scheduler\.rest: got 'promote'; expected stop where none of"):
        space_of({"scheduler": scheduler})
    with pytest.raises(ConfigError, match=r"rest: got 'promote'; expected stop: with promote: false nobody waits"):
        space_of({"scheduler": {**scheduler, "promote": False}, "max_hours": 1.0})


def test_what_waits_is_explained_until_it_is_promoted(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    first, second = started(study), started(study)
    for start, value in ((first, 0.9), (second, 0.5)):
        study.epoch(start.id, 1, EPOCHS, metrics(value))
    study.waits(first.id, 1, b"state", 1.0)
    records = read_records(tmp_path)
    reason = explain(space, records, first.id)["reason"]
    assert reason == "waits after 1 epochs to be among the best of its rung: 1 of 1 at rung 1"
    record = records.trials[first.id]
    assert (record.status, record.worked, record.train_seconds) == ("waiting", 1.0, 1.0)
    for _ in range(2):  # one more, and the best of three is among the best third
        study.waits(second.id, 1, b"", 1.0)
        second = started(study)
        study.epoch(second.id, 1, EPOCHS, metrics(0.1))
    promoted = read_records(tmp_path).trials[first.id]
    assert (promoted.status, promoted.error) == ("running", None)
    assert [d.promoted for d in promoted.rungs] == [False, True]


def test_a_bool_is_asked_for_and_without_a_scheduler_nobody_waits() -> None:
    with pytest.raises(ConfigError, match=r"search\.scheduler\.promote: got 'often'"):
        space_of({"scheduler": {"name": "asha", "promote": "often"}})
    assert not Rungs(space_of({"scheduler": {"name": "none"}}), Records()).halving.rules.promote
