"""One contract for every sampler that takes constraints: infeasible trials guide it, and never break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import TrialState

from cactus_ray.search.objectives import feasible
from cactus_ray.search.sampler import OptunaSampler, Suggestion
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, TrialRecord

TRIALS = {"tpe": 40, "nsga2": 40, "nsga3": 40, "gp": 8}
SEEDS = {"gp": 1}
"""Searches that are taken together, elsewhere three; an ask of a GP takes seconds."""
Outcome = Callable[[dict[str, Any]], dict[str, float]]


def space(sampler: str, trials: int, seed: int = 0) -> Space:
    objectives = ["mean_certified_accuracy", "mean_standard_accuracy"][: 1 if sampler == "gp" else 2]
    return parse_space(
        {
            "name": "toy", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
            "levels": ["dense", "int8"],
            "parameters": {
                "standard_weight": {"min": 0.0, "max": 1.0},
                "box_ratio": {"min": 0.01, "max": 1.0},
                "method": {"value": "sabr"},
            },
            "constraints": [{"metric": "standard_accuracy@int8", "min": 0.8}, {"metric": "macs@dense", "max": 0.8}],
            "objectives": [{"metric": metric} for metric in objectives],
            "search": {"sampler": sampler, "trials": trials, "seed": seed},
        }
    )  # fmt: skip


def narrow(values: dict[str, Any]) -> dict[str, float]:
    """Both objectives lead away from the quarter of the square in which both constraints are met."""
    weight, box = values["standard_weight"], values["box_ratio"]
    return {
        "mean_certified_accuracy": box - weight / 2, "mean_standard_accuracy": box / 2 - weight,
        "standard_accuracy@int8": weight + 0.3, "macs@dense": box + 0.3,
    }  # fmt: skip


def hopeless(values: dict[str, Any]) -> dict[str, float]:
    """No configuration meets either constraint."""
    weight, box = values["standard_weight"], values["box_ratio"]
    return {**narrow(values), "standard_accuracy@int8": weight / 2, "macs@dense": 1 + box}


def run(sampler: OptunaSampler, count: int, outcome: Outcome) -> list[Suggestion]:
    found = []
    for _ in range(count):
        suggestion = sampler.ask()
        assert suggestion is not None
        found.append(suggestion)
        assert sampler.tell(suggestion.number, outcome(suggestion.values), "completed") == "completed"
    return found


def records_of(suggestions: list[Suggestion], outcome: Outcome) -> Records:
    records = Records()
    for s in suggestions:
        records.trials[f"t{s.number:04d}"] = TrialRecord(
            f"t{s.number:04d}", s.number, "completed", parameters=dict(s.values), metrics=outcome(s.values)
        )
    return records


@pytest.mark.parametrize("name", sorted({*TRIALS, "random"}))
def test_where_all_trials_are_infeasible_it_is_asked_and_resumed_like_any_other(name: str) -> None:
    count = min(TRIALS.get(name, 16), 16)
    asked = space(name, count)
    sampler = OptunaSampler(asked)
    whole = run(sampler, count, hopeless)
    for suggestion in whole:
        assert all(p.domain.contains(suggestion.values[p.name]) for p in asked.parameters)
    assert len({str(s.values) for s in whole}) == count
    told = [t for t in sampler._study.trials if t.state is TrialState.COMPLETE]  # the others were repetitions
    assert len(told) == count
    assert all(min(t.constraints.values()) > 0 for t in told)
    assert sampler._study.best_trials == []
    resumed = OptunaSampler(asked)
    resumed.replay(records_of(whole[: count - 2], hopeless))
    assert run(resumed, 2, hopeless) == whole[count - 2 :]


@pytest.mark.parametrize("name", sorted(TRIALS))
def test_feasible_configurations_are_proposed_more_often_than_by_chance(name: str) -> None:
    """In the later half of a search; by chance a quarter is feasible."""

    def share(sampler: str, trials: int) -> float:
        met = []
        for seed in range(SEEDS.get(sampler, 3)):
            asked = space(sampler, trials, seed)
            late = run(OptunaSampler(asked), trials, narrow)[trials // 2 :]
            met += [max(feasible(narrow(s.values), asked.constraints).values()) <= 0 for s in late]
        return sum(met) / len(met)

    chance = share("random", 40)
    assert 0.15 <= chance <= 0.35
    assert share(name, TRIALS[name]) > chance + 0.15
