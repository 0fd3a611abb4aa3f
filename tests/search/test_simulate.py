"""Simulated searches: what is counted, what it costs, and that nothing is invented."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from course import SPACE, begin, result, started

from cactus_ray.errors import UserError
from cactus_ray.search.decisions import rung_order
from cactus_ray.search.halving import replayed
from cactus_ray.search.pareto import relative_hypervolume
from cactus_ray.search.rungs import rules_of
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.simulate import Curve, Setup, comparable, distance, nearest, recorded_curves, simulate
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.surface import REFERENCE, synthetic_curves

PARAMETERS = {
    "method": {"values": ["cactus", "sabr"]},
    "learning_rate": {"min": 0.001, "max": 0.1, "distribution": "log_uniform_values"},
    "awp_radius": {"min": 0.0, "max": 1.0, "when": {"method": ["cactus"]}},
}
ASHA = SchedulerSettings(name="asha", promote=False)


@pytest.fixture(scope="module")
def space() -> Space:
    levels = ["dense", "int8", "prune:gu-l1:0.9"]
    return parse_space({**SPACE, "levels": levels, "parameters": PARAMETERS, "train": {"epochs": 12}}, "space.yaml")


@pytest.fixture(scope="module")
def curves(space: Space) -> list[Curve]:
    return synthetic_curves(space, 30, seed=0)


def whole_cost(curve: Curve) -> float:
    return math.fsum(curve.seconds) + curve.verify_seconds


def test_without_a_scheduler_everything_is_trained_and_every_second_counts(space: Space, curves: list[Curve]) -> None:
    found = simulate(space, curves, REFERENCE, Setup(sampler="random", trials=100))
    assert sorted(found.started) == list(range(30))
    assert (found.stopped, len(found.steps)) == (0, 30)
    assert found.cost == pytest.approx(sum(map(whole_cost, curves)))
    assert found.time == pytest.approx(found.cost)
    points = [p for c in curves for p in c.points]
    assert found.hypervolume == pytest.approx(relative_hypervolume(points, space.front, REFERENCE))
    assert found.cost_of(found.hypervolume) <= found.cost
    assert found.cost_of(found.hypervolume + 0.01) == math.inf


def test_workers_share_the_time_and_not_the_cost(space: Space, curves: list[Curve]) -> None:
    one, four = (
        simulate(space, curves, REFERENCE, Setup(sampler="random", trials=12, workers=workers)) for workers in (1, 4)
    )
    assert four.started == one.started  # random search does not look at what came back
    assert four.cost == pytest.approx(one.cost)
    assert one.time / 4 <= four.time < one.time / 2
    assert [s.hypervolume for s in four.steps] == sorted(s.hypervolume for s in four.steps)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_search_is_repeatable_and_uses_recorded_configurations_once(
    space: Space, curves: list[Curve], sampler: str
) -> None:
    setup = Setup(sampler=sampler, scheduler=ASHA, workers=3, trials=25, seed=4)
    once, again = simulate(space, curves, REFERENCE, setup), simulate(space, curves, REFERENCE, setup)
    assert once == again
    assert len(once.started) == len(set(once.started)) == 25
    assert simulate(space, curves, REFERENCE, replace(setup, seed=5)).started != once.started


def test_stopped_trials_cost_what_they_trained_and_never_count(space: Space, curves: list[Curve]) -> None:
    found = simulate(space, curves, REFERENCE, Setup(sampler="random", scheduler=ASHA, trials=30))
    stopped = {d.trial: d for d in found.decisions if not d.go_on}
    assert 0 < found.stopped == len(stopped) == 30 - len(found.steps)
    trials = {f"t{number:04d}": index for number, index in enumerate(found.started, 1)}
    finished = [curves[i] for trial, i in trials.items() if trial not in stopped]
    epochs = {trial: round(d.progress * 12) for trial, d in stopped.items()}
    spent = sum(map(whole_cost, finished)) + sum(math.fsum(curves[trials[t]].seconds[:e]) for t, e in epochs.items())
    assert found.cost == pytest.approx(spent)
    points = [p for curve in finished for p in curve.points]
    assert found.hypervolume == pytest.approx(relative_hypervolume(points, space.front, REFERENCE))


def test_the_nearest_unused_configuration_is_taken(space: Space, curves: list[Curve]) -> None:
    one = {"method": "cactus", "learning_rate": 0.01, "awp_radius": 0.5}
    assert distance(space, one, one) == 0
    assert distance(space, one, {**one, "learning_rate": 0.1}) == pytest.approx(0.25)
    assert distance(space, one, {"method": "sabr", "learning_rate": 0.01}) == 2
    assert nearest(space, curves[7].values, curves, range(30)) == 7
    assert nearest(space, curves[7].values, curves, [3, 5]) in (3, 5)


def test_the_curves_of_a_run_are_replayed_from_its_records(tmp_path: Path) -> None:
    space = parse_space(SPACE, "course.yaml")
    study = begin(space, tmp_path)
    for number in range(3):
        trial = started(study).id
        for epoch in (1, 2) if number < 2 else (2,):  # an epoch of the last one was lost
            metrics = {"standard_accuracy": 0.5, "ibp_certified_accuracy": 0.1 * number, "seconds": 1.5}
            study.epoch(trial, epoch, 2, metrics)
        for chunk in study.trained(trial, {"last": b"network"}, "last", 2, 3.0):
            study.verified(result(chunk))
    records = read_records(tmp_path)
    found = recorded_curves(records)
    assert [c.seconds for c in found] == [(1.5, 1.5)] * 2
    assert [c.verify_seconds for c in found] == pytest.approx([0.4, 0.4])
    assert comparable(space, found) == {"standard_accuracy": "maximize", "ibp_certified_accuracy": "maximize"}
    simulated = simulate(space, found, records.study["reference_point"], Setup(trials=5))
    assert simulated.cost == pytest.approx(6.8)
    assert simulated.hypervolume > 0


def test_curves_without_accuracies_are_refused(space: Space, curves: list[Curve]) -> None:
    bare: list[Any] = [replace(curve, metrics=tuple({"loss": 1.0} for _ in curve.metrics)) for curve in curves]
    with pytest.raises(UserError, match="lack the accuracies"):
        simulate(space, bare, REFERENCE, Setup(trials=1))


@pytest.mark.parametrize("workers", [1, 5])
def test_trials_that_wait_go_on_from_where_they_were(space: Space, curves: list[Curve], workers: int) -> None:
    promoting = replace(ASHA, promote=True, rest="promote")
    setup = Setup(sampler="random", scheduler=promoting, trials=30, workers=workers)
    found = simulate(space, curves, REFERENCE, setup)
    assert found == simulate(space, curves, REFERENCE, setup)
    assert sorted(found.started) == list(range(30))
    assert (found.stopped, len(found.steps)) == (0, 30)  # with nothing new to begin, whoever waits goes on
    assert found.cost == pytest.approx(sum(map(whole_cost, curves)))  # and no epoch is trained twice
    waited = {d.trial for d in found.decisions if not d.go_on}
    promoted = [d.trial for d in found.decisions if d.promoted]
    assert waited == set(promoted)
    at_once = simulate(space, curves, REFERENCE, Setup(sampler="random", trials=30, workers=workers))
    assert found.cost_of(0.9 * found.hypervolume) < at_once.cost_of(0.9 * found.hypervolume)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("trials", [1, 2, 5, 30])
def test_at_the_end_of_every_rung_at_least_the_best_three_go_on_and_the_others_stop(
    space: Space, curves: list[Curve], trials: int, workers: int
) -> None:
    setup = Setup(sampler="random", scheduler=replace(ASHA, promote=True), trials=trials, workers=workers)
    found = simulate(space, curves, REFERENCE, setup)
    by_rung = {d.rung: [other for other in found.decisions if other.rung == d.rung] for d in found.decisions}
    stopped = 0
    for decisions in by_rung.values():
        arrived = {d.trial for d in decisions}
        went_on = {d.trial for d in decisions if d.go_on}
        assert len(went_on) >= min(len(arrived), max(len(arrived) // 3, 3))
        assert len(went_on) <= max(len(arrived) // 2, 3)
        stopped += len(arrived - went_on)
    assert (len(found.steps), found.stopped) == (trials - stopped, stopped)
    assert replayed(rules_of(setup.scheduler, comparable(space, curves)), found.decisions) == sorted(
        found.decisions, key=rung_order
    )


def test_scoring_counts_where_rungs_ask(space: Space, curves: list[Curve]) -> None:
    free = simulate(space, curves, REFERENCE, Setup(sampler="random", scheduler=ASHA, trials=30))
    levels = dict.fromkeys(space.levels, 0.25)
    paid = [replace(curve, score_seconds=levels) for curve in curves]
    scored = simulate(space, paid, REFERENCE, Setup(sampler="random", scheduler=ASHA, trials=30))
    assert scored.started == free.started
    assert scored.cost - free.cost == pytest.approx(0.5 * len(free.decisions))  # two extreme levels
