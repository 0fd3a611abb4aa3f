"""One contract for everything that stops trials early: the core, Ray Tune's scheduler and the study behind the driver.

Every world gets the same reports and must give the same answers, also when it is taken down and built again between
two of them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from course import REFERENCE, SPACE, result

from cactus_ray.cluster.scheduler import Constraint, MultiObjectiveASHA
from cactus_ray.config import to_dict
from cactus_ray.search.halving import Decision, Halving, Rules
from cactus_ray.search.objectives import feasible
from cactus_ray.search.rungs import proxy_goals
from cactus_ray.search.space import parse_space
from cactus_ray.search.store import Records, RunStore, read_records, with_front
from cactus_ray.search.study import Study

EPOCHS = 30
GOALS = proxy_goals(["dense", "int8"])
NAMES = tuple(GOALS)


class World(Protocol):
    def start(self) -> str: ...
    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, Any]) -> bool: ...
    def end(self, trial: str) -> None: ...
    def again(self) -> None: ...
    def decisions(self) -> list[Decision]: ...


class Core:
    """The decision core by itself."""

    def __init__(self, folder: Path, constraints: Sequence[Constraint] = ()) -> None:
        self.halving, self.number = Halving(Rules(goals=GOALS, constraints=tuple(constraints))), 0

    def start(self) -> str:
        self.number += 1
        return f"t{self.number:04d}"

    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, Any]) -> bool:
        found = self.halving.report(trial, epoch, metrics, epoch / EPOCHS)
        return found is None or found.go_on

    def end(self, trial: str) -> None:
        pass

    def again(self) -> None:
        state = json.loads(json.dumps(self.halving.state()))
        self.halving = Halving(self.halving.rules)
        self.halving.take_up(map(Decision.of_event, state))

    def decisions(self) -> list[Decision]:
        return self.halving.decisions


class Tune(Core):
    """Ray Tune's side, called as its controller does; Ray itself is not started."""

    def __init__(self, folder: Path, constraints: Sequence[Constraint] = ()) -> None:
        self.folder, self.number, self.constraints = folder, 0, constraints
        self.scheduler = MultiObjectiveASHA(NAMES, ["max"] * len(NAMES), max_t=EPOCHS, constraints=constraints)
        self.running: set[str] = set()

    def start(self) -> str:
        trial = super().start()
        self.running.add(trial)
        return trial

    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, Any]) -> bool:
        tune_trial, found = SimpleNamespace(trial_id=trial), {"training_iteration": epoch, **metrics}
        if trial not in self.running:  # Tune knows only the last word of such a trial
            self.scheduler.on_trial_complete(None, tune_trial, found)
            return False
        go_on = self.scheduler.on_trial_result(None, tune_trial, found) == "CONTINUE"
        if not go_on:
            self.running.discard(trial)
        return go_on

    def end(self, trial: str) -> None:
        self.running.discard(trial)

    def again(self) -> None:
        self.scheduler.save(str(self.folder / "scheduler.json"))
        goals = ["maximize"] * len(NAMES)
        self.scheduler = MultiObjectiveASHA(NAMES, goals, max_t=EPOCHS, constraints=self.constraints)
        self.scheduler.restore(str(self.folder / "scheduler.json"))

    def decisions(self) -> list[Decision]:
        return self.scheduler.halving.decisions


class Driver:
    """The study that trials ask through the mailbox, and its records. Constraints are those of its space."""

    def __init__(
        self, folder: Path, constraints: Sequence[Constraint] = (), sampler: str = "random", promote: bool = False
    ) -> None:  # fmt: skip
        search = {"trials": 40, "sampler": sampler, "scheduler": {"name": "asha", "promote": promote}}
        limits = [to_dict(constraint) for constraint in constraints]
        self.folder = folder
        self.space = parse_space(
            {**SPACE, "train": {"epochs": EPOCHS}, "search": search, "constraints": limits}, "contract.yaml"
        )
        self.study = self._study()
        self.study.begin({"name": "contract", "seed": 0}, REFERENCE)

    def _study(self) -> Study:
        file = self.folder / "trials.jsonl"
        records = read_records(self.folder) if file.exists() else Records()
        return Study(self.space, RunStore(self.folder), records, [0, 1, 2])

    def start(self) -> str:
        found = self.study.next_trial()
        assert found is not None
        assert found.asked == found.scored == (1, 3, 9, 27)
        return found.id

    def epoch(self, trial: str, epoch: int, metrics: Mapping[str, Any]) -> bool:
        go_on = self.study.epoch(trial, epoch, EPOCHS, dict(metrics))
        if not go_on and trial in self.study.training:
            self.study.waits(trial, epoch, b"state", 1.0)
        return go_on

    def end(self, trial: str) -> None:
        self.study.failed(trial, "out of memory")

    def again(self) -> None:
        open_trials = set(self.study.training)
        self.study = self._study()
        while self.study.restart:  # those that trained are trained again
            found = self.study.next_trial()
            assert found is not None
            open_trials.discard(found.id)
        assert not open_trials

    def decisions(self) -> list[Decision]:
        recorded = read_records(self.folder).trials.values()
        assert sorted(map(str, self.study.rungs.halving.decisions)) == sorted(str(d) for t in recorded for d in t.rungs)
        return self.study.rungs.halving.decisions


WORLDS: dict[str, Any] = {"core": Core, "tune": Tune, "driver": Driver}
IMPOSSIBLE = (Constraint("standard_accuracy@dense", min=2.0), Constraint("standard_accuracy@int8", max=-1.0))
"""Nobody can meet them: neither what is reported at rungs, nor what is measured at the end."""


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    found: World = WORLDS[request.param](tmp_path)
    return found


def metrics(*values: float) -> dict[str, float]:
    """Standard and certified accuracy at dense, then at int8; what is not given repeats the last."""
    padded = [*values, *[values[-1]] * (len(NAMES) - len(values))]
    return dict(zip(NAMES, padded, strict=True))


def test_worse_trials_stop_at_rungs_and_only_there(world: World) -> None:
    trials = [world.start() for _ in range(6)]
    assert [world.epoch(t, 1, metrics(0.1 * i)) for i, t in enumerate(trials, 1)] == [True] * 6  # each beats the last
    assert [world.epoch(t, 2, metrics(0.0)) for t in trials] == [True] * 6
    found = [world.epoch(t, 3, metrics(1.0 - 0.1 * i)) for i, t in enumerate(trials)]
    assert found == [True, True, False, False, False, False]
    assert [(d.rank, d.of, d.rung) for d in world.decisions()][6:] == [(i, i, 3) for i in range(1, 7)]


def test_an_early_best_that_falls_behind_is_stopped(world: World) -> None:
    early, *others = [world.start() for _ in range(4)]
    assert world.epoch(early, 1, metrics(0.99))
    for other in others[:2]:
        world.epoch(other, 1, metrics(0.5))
        world.epoch(other, 3, metrics(0.8))
    assert not world.epoch(early, 3, metrics(0.3))
    assert world.decisions()[-1].rank == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_nan_and_missing_objectives_rank_last(world: World, bad: float | None) -> None:
    good, broken, missing, worse = [world.start() for _ in range(4)]
    assert world.epoch(good, 1, metrics(0.0))
    assert not world.epoch(broken, 1, {**metrics(0.9), NAMES[1]: bad})
    assert not world.epoch(missing, 1, dict.fromkeys(NAMES[1:], 0.9))
    world.epoch(worse, 1, metrics(-1.0))
    assert [d.rank for d in world.decisions()] == [1, 2, 3, 2]


def test_a_report_after_the_end_of_its_trial_counts_at_the_rung(world: World) -> None:
    late, *others = [world.start() for _ in range(3)]
    world.end(late)
    world.epoch(late, 1, metrics(0.9))
    for other in others:
        world.epoch(other, 1, metrics(0.8))
    assert [(d.rank, d.of) for d in world.decisions()] == [(1, 1), (2, 2), (3, 3)]
    assert not world.decisions()[-1].go_on


def play(world: World, break_at: int | None) -> list[Decision]:
    trials = [world.start() for _ in range(7)]
    going, steps = dict.fromkeys(trials, True), 0
    for epoch in (1, 2, 3, 9):
        for i, trial in enumerate(trials):
            if going[trial]:
                going[trial] = world.epoch(
                    trial, epoch, metrics(*((7 * i + 3 * epoch + j) % 10 / 10 for j in range(4)))
                )
            steps += 1
            if steps == break_at:
                world.again()
                if going[trial]:  # what it had just said is said again
                    going[trial] = world.epoch(trial, epoch, metrics(0.123))
    return world.decisions()


@pytest.mark.parametrize("break_at", [3, 7, 17])
@pytest.mark.parametrize("kind", sorted(WORLDS))
def test_resuming_in_the_middle_of_a_rung_changes_nothing(kind: str, break_at: int, tmp_path: Path) -> None:
    folders = [tmp_path / "through", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    through, broken = (
        play(WORLDS[kind](folder), at) for folder, at in zip(folders, (None, break_at), strict=True)
    )  # fmt: skip
    assert sorted(map(str, through)) == sorted(map(str, broken))
    assert 0 < sum(not d.go_on for d in through) < len(through)


def test_all_worlds_decide_alike(tmp_path: Path) -> None:
    found = []
    for kind in WORLDS:
        (tmp_path / kind).mkdir()
        found.append([(d.trial, d.rung, d.rank, d.of, d.go_on) for d in play(WORLDS[kind](tmp_path / kind), None)])
    assert found[0] == found[1] == found[2]


# --- all trials infeasible: constraints on what is reported --------------------------------------------------------


@pytest.fixture(params=["core", "tune"])
def constrained(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    found: World = WORLDS[request.param](tmp_path, IMPOSSIBLE)
    return found


def test_where_all_trials_are_infeasible_those_that_break_least_go_on(constrained: World) -> None:
    trials = [constrained.start() for _ in range(7)]
    quality = [0.5, 0.2, 0.9, 0.4, 0.5, 0.7, 0.1]  # standard accuracy when dense; all break what is asked at int8 alike
    answers = []
    for trial, value in zip(trials, quality, strict=True):
        answers.append(constrained.epoch(trial, 1, metrics(value, 0.0)))
        constrained.again()
    found = constrained.decisions()
    assert [(d.rank, d.of) for d in found] == [(1, 1), (2, 2), (1, 3), (3, 4), (3, 5), (2, 6), (7, 7)]
    assert answers == [d.go_on for d in found] == [True, True, True, False, False, True, False]
    assert {d.front for d in found} == {None}
    assert all(set(d.values) == set(NAMES) for d in found)


def test_infeasible_trials_rank_behind_any_feasible_and_before_those_that_lack_a_value(tmp_path: Path) -> None:
    limit = (Constraint(NAMES[0], min=0.5), Constraint("latency", max=20.0))
    for kind in ("core", "tune"):
        world: World = WORLDS[kind](tmp_path, limit)
        good, broken, slow, missing = (world.start() for _ in range(4))
        world.epoch(slow, 1, {**metrics(0.9), "latency": 21.0})
        world.epoch(missing, 1, metrics(0.9))  # it does not say how slow it is
        world.epoch(broken, 1, {**metrics(0.4, 0.9), "latency": 1.0})
        assert world.epoch(good, 1, {**metrics(0.5, 0.0), "latency": 20.0})
        assert [(d.rank, d.front) for d in world.decisions()] == [(1, None), (2, None), (1, None), (1, 0)]
        world.epoch(world.start(), 1, {**metrics(0.6, 0.0), "latency": math.nan})
        assert world.decisions()[-1].rank == 5


def test_constraints_of_a_space_are_not_those_of_its_rungs(tmp_path: Path) -> None:
    found = []
    for name, limits in (("free", ()), ("constrained", IMPOSSIBLE)):
        (tmp_path / name).mkdir()
        found.append(list(map(str, play(Driver(tmp_path / name, limits), None))))
    assert found[0] == found[1]


@pytest.mark.parametrize("promote", [False, True])
def test_a_study_whose_trials_are_all_infeasible_goes_on_to_its_end(tmp_path: Path, promote: bool) -> None:
    world = Driver(tmp_path, IMPOSSIBLE, "tpe", promote)
    while (start := world.study.next_trial()) is not None:
        quality = (7 * start.number) % 10 / 10
        if all(world.epoch(start.id, epoch, metrics(quality)) for epoch in start.asked if epoch > start.epoch):
            for chunk in world.study.trained(start.id, {"last": start.id.encode()}, "last", EPOCHS, 2.0):
                world.study.verified(result(chunk))
        if start.number % 10 == 3:
            world.again()
    assert world.study.done
    records = read_records(tmp_path)
    ended = {t.id: t.status for t in records.trials.values()}
    complete = [t for t in records.trials.values() if t.status == "completed"]
    assert set(ended.values()) == {"completed", "stopped"}
    assert len(ended) == 40
    assert len(complete) >= 2
    assert all(any(v > 0 for v in feasible(t.metrics, world.space.constraints).values()) for t in complete)
    assert {p["trial"] for p in with_front(records, world.space.front) if p["on_front"]} == {t.id for t in complete}
    world.decisions()


# --- the study's own side ------------------------------------------------------------------------------------------


def test_a_stopped_trial_is_on_no_front_and_verdicts_after_the_end_of_training_count(tmp_path: Path) -> None:
    world = Driver(tmp_path)
    best, *others = [world.start() for _ in range(3)]
    world.epoch(best, 1, metrics(0.99))
    chunks = []
    for other in others:
        world.epoch(other, 3, metrics(0.8))
        chunks += world.study.trained(other, {"last": b"network"}, "last", EPOCHS, 2.0)
    assert not world.epoch(best, 3, metrics(0.3))
    assert best not in world.study.training
    for chunk in chunks:
        world.study.verified(result(chunk))
    records = read_records(tmp_path)
    assert records.trials[best].status == "stopped"
    assert records.trials[best].error == "3 of 3 at rung 3"
    assert records.trials[best].train_seconds == 1.0
    assert {p["trial"] for p in with_front(records, world.space.front) if p["on_front"]} == set(others)


def test_a_driver_that_died_with_the_answer_ends_the_trial(tmp_path: Path) -> None:
    world = Driver(tmp_path)
    trials = [world.start() for _ in range(3)]
    answers = [world.study.epoch(t, 1, EPOCHS, metrics(0.9 - 0.1 * i)) for i, t in enumerate(trials)]
    assert answers == [True, True, False]
    second = world._study()
    assert [start.id for start in second.restart] == trials[:2]
    assert read_records(tmp_path).trials[trials[2]].status == "stopped"


def test_without_a_scheduler_nobody_is_asked_and_curves_can_be_recorded_whole(tmp_path: Path) -> None:
    search = {"trials": 3, "scheduler": {"score": "epochs"}}
    space = parse_space({**SPACE, "train": {"epochs": 4}, "search": search}, "contract.yaml")
    study = Study(space, RunStore(tmp_path), Records(), [0])
    start = study.next_trial()
    assert start is not None
    assert (start.asked, start.scored) == ((), (1, 2, 3, 4))
    assert study.epoch(start.id, 1, 4, {})
