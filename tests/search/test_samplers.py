"""Samplers beyond the common contract: what each can search, what it is told of a long study, and the grid."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from test_sampler import SPACE, measured, mixed, records_of

from cactus_ray.errors import ConfigError
from cactus_ray.search import importance
from cactus_ray.search.model import Shown
from cactus_ray.search.sampler import OptunaSampler, Suggestion
from cactus_ray.search.samplers import grid
from cactus_ray.search.space import Space, parse_space

NUMBERS = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
    "standard_weight": {"min": 0.0, "max": 1.0},
    "train.epochs": {"min": 2, "max": 9},
}
ONE = [{"metric": "mean_certified_accuracy"}]
FEW = {
    "method": {"values": ["cactus", "sabr"]},
    "train.epochs": {"min": 2, "max": 4},
    "awp_radius": {"values": [0.0, 0.5], "when": {"method": ["cactus"]}},
}


def space(sampler: str, trials: int = 30, **change: Any) -> Space:
    return parse_space({**SPACE, "constraints": [], **change, "search": {"sampler": sampler, "trials": trials}})


def run(sampler: OptunaSampler, count: int) -> list[Suggestion]:
    found = []
    for _ in range(count):
        suggestion = sampler.ask()
        assert suggestion is not None
        found.append(suggestion)
        status = mixed(suggestion.number)
        sampler.tell(
            suggestion.number, measured({"learning_rate": 0.01, "standard_weight": 0.5, **suggestion.values}), status
        )
    return found


@pytest.mark.parametrize("name", ["gp", "cmaes"])
def test_models_of_numbers_say_the_same_after_a_resume(name: str) -> None:
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        pytest.skip("cmaes is not installed")
    numbers = space(name, parameters=NUMBERS, objectives=ONE)
    whole = run(OptunaSampler(numbers), 16)
    resumed = OptunaSampler(numbers)
    resumed.replay(records_of(whole[:13], mixed))
    assert run(resumed, 3) == whole[13:]
    assert len({str(s.values) for s in whole}) == 16


def test_gp_takes_choices_conditions_several_objectives_and_constraints() -> None:
    constraints = [{"metric": "standard_accuracy@int8", "min": 0.5}]
    suggestions = run(OptunaSampler(space("gp", trials=16, constraints=constraints)), 7)
    assert [s.number for s in suggestions] == list(range(1, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "method is a choice"),
        ({"parameters": {**NUMBERS, "model.hidden": {"values": [[32], [64]]}}}, "model.hidden is a choice"),
        ({"parameters": {**NUMBERS, "awp_radius": {"min": 0.1, "max": 0.5, "when": {"train.epochs": [3]}}}},
         "awp_radius is conditional"),
        ({"parameters": NUMBERS, "objectives": [*ONE, {"metric": "mean_standard_accuracy"}]}, "one objective"),
        ({"parameters": NUMBERS, "objectives": ONE, "constraints": [{"metric": "hypervolume", "min": 0.5}]},
         "knows no constraints, and this space has hypervolume >= 0.5"),
        ({"parameters": {"learning_rate": {"min": 0.1, "max": 0.2}}, "objectives": ONE}, "at least two parameters"),
    ],
)  # fmt: skip
def test_cmaes_is_refused_by_name_where_it_cannot_search(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.sampler: got 'cmaes'") as caught:
        space("cmaes", **change)
    assert reason in str(caught.value)


def test_a_grid_of_a_continuous_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate is continuous"):
        space("grid", parameters=NUMBERS)


def test_a_grid_is_walked_once_and_ends() -> None:
    small = space("grid", parameters=FEW)
    assert len(list(grid(small))) == 9  # three epochs of sabr, and of cactus with each of two radii
    sampler = OptunaSampler(small)
    walked = [s.values for s in run(sampler, 4)]
    resumed = OptunaSampler(small)
    resumed.replay(records_of([Suggestion(i + 1, v) for i, v in enumerate(walked)], lambda n: "stopped"))
    walked += [s.values for s in run(resumed, 5)]
    assert walked == list(grid(small))
    assert resumed.ask() is None
    assert resumed.exhausted


# --- long studies --------------------------------------------------------------------------------------------------


def test_a_model_sees_the_newest_and_the_non_dominated() -> None:
    shown = Shown(6)
    shown.add(0, [0.0, 1.0])
    shown.add(1, [1.0, 0.0])
    for number in range(2, 20):
        shown.add(number, [2.0, 2.0] if number % 2 else None)  # dominated, or nothing known
    assert shown.numbers() == {0, 1, 16, 17, 18, 19}
    shown.add(20, [-1.0, -1.0])  # dominates all
    assert shown.front == [20]
    assert shown.numbers() == {15, 16, 17, 18, 19, 20}


def test_of_a_large_front_the_newest_half_of_the_model_is_shown() -> None:
    shown = Shown(10)
    for number in range(30):
        shown.add(number, [float(number), -float(number)])
    assert shown.numbers() == set(range(20, 30))
    for number in range(30, 60):
        shown.add(number, [99.0, 99.0])
    assert shown.numbers() == {25, 26, 27, 28, 29, 55, 56, 57, 58, 59}


def test_tpe_is_asked_with_its_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("cactus_ray.search.sampler").search.sampler.MODEL_TRIALS, "tpe", 8)
    sampler = OptunaSampler(space("tpe", parameters=NUMBERS))
    run(sampler, 20)
    seen: list[int] = []
    inner = sampler._storage.get_all_trials

    def watch(study: int, deepcopy: bool = True, states: Any = None) -> list[Any]:
        found = inner(study, deepcopy, states)
        seen.append(len([t for t in found if t.state.is_finished()]))
        return found

    monkeypatch.setattr(sampler._storage, "get_all_trials", watch)
    assert sampler.ask() is not None
    assert max(seen) == 8
    monkeypatch.undo()
    assert len(sampler._study.trials) == 21


def test_importances_of_many_trials_come_from_ped_anova(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "MANY_TRIALS", 40)
    sampler = OptunaSampler(space("random", trials=80))
    records = records_of(run(sampler, 80), mixed)
    complete = sum(t.status == "completed" for t in records.trials.values())
    assert importance.evaluator_name(complete) == "PED-ANOVA"
    for shares in importance.importances(sampler.space, records).values():
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares["model.hidden"] < max(shares["learning_rate"], shares["standard_weight"], shares["awp_radius"])


def test_a_repetition_is_said() -> None:
    tiny = space("random", parameters={"train.epochs": {"min": 2, "max": 3}})
    notes = [s.note for s in run(OptunaSampler(tiny), 3)]
    assert notes[:2] == [None, None]
    assert notes[2] is not None
    assert notes[2].startswith("a repetition: 16 redraws")
