"""Samplers hear the truth about every trial, and say the same again after a resume."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from cactus_ray.errors import UserError
from cactus_ray.search.importance import importances
from cactus_ray.search.pareto import hypervolume
from cactus_ray.search.sampler import OptunaSampler, Suggestion
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, TrialRecord

SPACE: dict[str, Any] = {
    "name": "toy", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
    "levels": ["dense", "int8"],
    "parameters": {
        "method": {"values": ["cactus", "sabr"]},
        "learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
        "standard_weight": {"min": 0.0, "max": 1.0},
        "model.hidden": {"values": [[32], [64, 32]]},
        "train.batch_size": {"distribution": "q_log_uniform_values", "min": 16, "max": 256, "q": 16},
        "awp_radius": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1, "when": {"method": ["cactus"]}},
    },
    "constraints": [{"metric": "standard_accuracy@int8", "min": 0.5}],
}  # fmt: skip
SAMPLERS = ("tpe", "nsga2", "nsga3", "random")


def space(sampler: str = "tpe", trials: int = 45, **change: Any) -> Space:
    return parse_space({**copy.deepcopy(SPACE), "search": {"sampler": sampler, "trials": trials}, **change})


def measured(values: Mapping[str, Any]) -> dict[str, float]:
    """Two objectives that contradict each other along standard_weight; the rest has one best place."""
    off = abs(math.log10(values["learning_rate"]) + 2) / 2 + 0.5 * (1 - values.get("awp_radius", 0.0))
    weight = values["standard_weight"]
    return {
        "mean_certified_accuracy": 1 - weight**2 - off,
        "mean_standard_accuracy": 1 - (1 - weight) ** 2 - off,
        "standard_accuracy@int8": 1 - off,
    }


def run(sampler: OptunaSampler, count: int, status: Callable[[int], str] = lambda n: "completed") -> list[Suggestion]:
    suggestions = []
    for _ in range(count):
        suggestion = sampler.ask()
        suggestions.append(suggestion)
        sampler.tell(suggestion.number, measured(suggestion.values), status(suggestion.number))
    return suggestions


def mixed(number: int) -> str:
    return {0: "failed", 1: "stopped"}.get(number % 7, "completed")


def records_of(suggestions: list[Suggestion], status: Callable[[int], str]) -> Records:
    records = Records()
    for s in suggestions:
        trial = TrialRecord(f"t{s.number:04d}", s.number, status(s.number))
        # as JSON hands it back: lists for tuples
        trial.parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in s.values.items()}
        trial.metrics = measured(s.values) if trial.status == "completed" else {}
        records.trials[trial.id] = trial
    return records


def states(sampler: OptunaSampler) -> list[TrialState]:
    return [t.state for t in sampler._study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_and_order_give_the_same_suggestions(name: str) -> None:
    first, second = (run(OptunaSampler(space(name)), 25, mixed) for _ in range(2))
    assert first == second
    other = run(OptunaSampler(space(name, search={"sampler": name, "seed": 1})), 25, mixed)
    assert first != other


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("cut", [1, 12, 19])
def test_a_resumed_search_goes_on_as_if_it_had_not_stopped(name: str, cut: int) -> None:
    whole = run(OptunaSampler(space(name)), 25, mixed)
    resumed = OptunaSampler(space(name))
    resumed.replay(records_of(whole[:cut], mixed))
    assert run(resumed, 25 - cut, mixed) == whole[cut:]


def test_trials_that_were_running_stay_open_after_replay() -> None:
    whole = run(OptunaSampler(space()), 6)
    resumed = OptunaSampler(space())
    resumed.replay(records_of(whole, lambda n: {5: "running", 6: "trained"}.get(n, "completed")))
    assert states(resumed)[-2:] == [TrialState.RUNNING, TrialState.RUNNING]
    assert resumed.ask().number == 7
    assert resumed.tell(5, measured(whole[4].values), "completed") == "completed"
    assert resumed.tell(6, None, "failed") == "failed"


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"learning_rate": 7.0}, "learning_rate = 7.0"),
        ({"box_ratio": 0.5}, "would not ask for box_ratio"),
        ({"standard_weight": None}, "standard_weight = None"),
    ],
)
def test_records_of_another_space_are_refused(change: dict[str, Any], hint: str) -> None:
    records = records_of(run(OptunaSampler(space()), 1), mixed)
    parameters = records.trials["t0001"].parameters | change
    records.trials["t0001"].parameters = {k: v for k, v in parameters.items() if v is not None}
    with pytest.raises(UserError, match=r"t0001.*--from-scratch") as caught:
        OptunaSampler(space()).replay(records)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_front_grows_beyond_a_third_of_the_search(name: str) -> None:
    suggestions = run(OptunaSampler(space(name)), 45)
    values = np.array([[-v for v in list(measured(s.values).values())[:2]] for s in suggestions])
    early, late = hypervolume(values[:15], [1.0, 1.0]), hypervolume(values, [1.0, 1.0])
    assert late > early
    if name != "random":
        chance = [[-v for v in list(measured(s.values).values())[:2]] for s in run(OptunaSampler(space("random")), 45)]
        assert np.mean(values[-15:]) < np.mean(chance[-15:])  # it looks where it is good


def test_values_stay_in_their_ranges_and_conditions_hold() -> None:
    sampler = OptunaSampler(space("random", 200))
    for suggestion in run(sampler, 60):
        values = suggestion.values
        assert ("awp_radius" in values) == (values["method"] == "cactus")
        assert all(p.domain.contains(values[p.name]) for p in sampler.space.parameters if p.name in values)
        assert values["train.batch_size"] % 16 == 0
        config = sampler.space.configuration(values, suggestion.number)
        assert (config.awp_radius is None) == (config.method == "sabr")


# --- what is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        {},
        {"mean_certified_accuracy": 0.5, "standard_accuracy@int8": 0.9},
        {"mean_certified_accuracy": math.nan, "mean_standard_accuracy": 0.9, "standard_accuracy@int8": 0.9},
        {"mean_certified_accuracy": math.inf, "mean_standard_accuracy": 0.9, "standard_accuracy@int8": 0.9},
        {"mean_certified_accuracy": None, "mean_standard_accuracy": 0.9, "standard_accuracy@int8": 0.9},
        {"mean_certified_accuracy": 0.5, "mean_standard_accuracy": 0.9},
        {"mean_certified_accuracy": 0.5, "mean_standard_accuracy": 0.9, "standard_accuracy@int8": math.nan},
    ],
)
def test_only_a_full_finite_record_is_complete(metrics: dict[str, Any] | None) -> None:
    sampler = OptunaSampler(space())
    assert sampler.tell(sampler.ask().number, metrics, "completed") == "failed"
    assert states(sampler) == [TrialState.FAIL]


def test_stopped_and_failed_trials_never_reach_the_front() -> None:
    sampler = OptunaSampler(space())
    best = {"mean_certified_accuracy": 9.0, "mean_standard_accuracy": 9.0, "standard_accuracy@int8": 1.0}
    for status in ("stopped", "failed"):
        assert sampler.tell(sampler.ask().number, best, status) == status
    kept = sampler.ask()
    sampler.tell(kept.number, dict.fromkeys(best, 0.6), "completed")
    assert states(sampler) == [TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert [t.number for t in sampler._study.best_trials] == [kept.number - 1]


def test_constraints_reach_optuna() -> None:
    sampler = OptunaSampler(space())
    for accuracy in (0.4, 0.8):
        metrics = {"mean_certified_accuracy": 0.5, "mean_standard_accuracy": 0.5, "standard_accuracy@int8": accuracy}
        sampler.tell(sampler.ask().number, metrics, "completed")
    found = [t.constraints for t in sampler._study.trials]
    assert found == [{"standard_accuracy@int8 >= 0.5": pytest.approx(v)} for v in (0.1, -0.3)]
    assert [t.number for t in sampler._study.best_trials] == [1]


def test_a_trial_is_told_once_and_by_a_known_status() -> None:
    sampler = OptunaSampler(space())
    number = sampler.ask().number
    with pytest.raises(ValueError, match="'done'; expected one of completed"):
        sampler.tell(number, None, "done")
    sampler.tell(number, None, "failed")
    with pytest.raises(KeyError):
        sampler.tell(number, None, "failed")


# --- repetitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_configuration_is_drawn_twice_while_there_are_others(name: str) -> None:
    few = {"learning_rate": {"values": [0.01, 0.02, 0.03]}, "method": {"values": ["cactus", "sabr"]}}
    sampler = OptunaSampler(space(name, parameters=few, constraints=[]))
    drawn = []
    for _ in range(6):
        suggestion = sampler.ask()
        drawn.append(tuple(sorted(suggestion.values.items())))
        rate = suggestion.values["learning_rate"]
        sampler.tell(suggestion.number, {"mean_certified_accuracy": rate, "mean_standard_accuracy": rate}, "completed")
    assert len(set(drawn)) >= 5
    assert sampler.ask().number == 7  # all are known: drawn again rather than for ever


def test_a_space_without_parameters_can_be_asked() -> None:
    sampler = OptunaSampler(space(parameters={}))
    assert [sampler.ask() for _ in range(2)] == [Suggestion(1, {}), Suggestion(2, {})]
    assert len(states(sampler)) == 2


# --- importances and manners ---------------------------------------------------------------------------------------


def test_importances_name_what_matters() -> None:
    sampler = OptunaSampler(space("random", 60))
    suggestions = run(sampler, 60, mixed)
    found = importances(sampler.space, records_of(suggestions, mixed))
    assert set(found) == {"mean_certified_accuracy", "mean_standard_accuracy"}
    for shares in found.values():
        assert set(shares) == {p.name for p in sampler.space.parameters}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert next(iter(shares)) in ("learning_rate", "awp_radius", "standard_weight")
        assert shares["model.hidden"] < 0.1


def test_importances_of_too_few_trials_are_empty() -> None:
    assert importances(space(), Records()) == {"mean_certified_accuracy": {}, "mean_standard_accuracy": {}}
    few = records_of(run(OptunaSampler(space()), 2), lambda n: "completed")
    assert importances(space(), few)["mean_certified_accuracy"] == {}


def test_optuna_is_silent_here_and_as_before_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            run(OptunaSampler(space()), 3)
    finally:
        optuna.logging.disable_propagation()
    assert not caplog.records
    assert optuna.logging.get_verbosity() == before
