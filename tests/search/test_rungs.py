"""Where rungs are in a study, what is compared there, and what an epoch costs."""

from pathlib import Path
from typing import Any

import pytest
from course import REFERENCE, SPACE

from cactus_ray.config import RunConfig, parse
from cactus_ray.errors import UserError
from cactus_ray.models import create
from cactus_ray.models.network import Network
from cactus_ray.search.halving import Rules
from cactus_ray.search.rungs import (
    accuracy_goals,
    epoch_costs,
    extreme_levels,
    proxy_goals,
    rung_epochs,
    scored_levels,
)
from cactus_ray.search.space import parse_space
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study


@pytest.mark.parametrize(
    ("levels", "ends"),
    [
        (["dense"], ("dense",)),
        (["int8", "dense", "int4", "prune:gu-l1:0.9"], ("dense", "prune:gu-l1:0.9")),
        (["int8", "prune:gu-l1:0.5+int4", "fp16"], ("fp16", "prune:gu-l1:0.5+int4")),
        (["prune:gs-l2:0.5+int8", "int3", "w8a8"], ("w8a8", "prune:gs-l2:0.5+int8")),  # half of both sides goes
        (["int8", "int8:affine"], ("int8",)),
    ],
)
def test_the_extreme_levels_are_those_of_most_and_fewest_bits(levels: list[str], ends: tuple[str, ...]) -> None:
    assert extreme_levels(levels) == ends
    assert list(accuracy_goals(levels)) == [
        f"{name}@{level}" for level in ends for name in ("standard_accuracy", "ibp_certified_accuracy")
    ]


def test_the_size_is_compared_where_training_decides_it() -> None:
    assert proxy_goals(["dense", "int8"]) == accuracy_goals(["dense", "int8"])
    levels = ["dense", "prune:gs-l2:0.3", "prune:gs-l2:0.5+int8", "prune:gu-l1:0.95"]
    goals = proxy_goals(levels)
    assert {name for name, goal in goals.items() if goal == "minimize"} == {"ideal_bits@prune:gs-l2:0.5+int8"}
    assert {name for name, goal in goals.items() if goal == "maximize"} == set(accuracy_goals(levels))
    assert scored_levels(levels) == ("dense", "prune:gu-l1:0.95", "prune:gs-l2:0.5+int8")
    assert scored_levels(["dense", "prune:gs-l2:0.5+int8"]) == ("dense", "prune:gs-l2:0.5+int8")


@pytest.mark.parametrize(
    ("least", "epochs", "cost", "expected"),
    [
        (1, 40, 1.0, (1, 3, 9, 27)),
        (1, 9, 1.0, (1, 3)),  # the ninth is the last: there is nothing left to save
        (3, 40, 1.0, (3, 9, 27)),
        (1, 40, 2.0, (1, 2, 5, 14)),
        (1, 40, 5.0, (1, 2, 6, 17)),
        (1, 40, 0.5, (2, 6, 18)),
        (1, 1, 1.0, ()),
    ],
)
def test_trials_are_asked_at_equal_cost(least: int, epochs: int, cost: float, expected: tuple[int, ...]) -> None:
    assert rung_epochs(Rules(goals={"a": "maximize"}), least, epochs, cost) == expected


def config(**values: Any) -> RunConfig:
    plain = {"data": {"name": "digits"}, "model": {"name": "mlp", "hidden": [64]}, "threat": {"epsilon": 0.1}}
    return parse(RunConfig, {**plain, "method": "ibp", **values})


def test_an_epoch_of_a_quarter_of_the_images_costs_a_quarter() -> None:
    cost = epoch_costs(config(), lambda run: create(run, (1, 8, 8), 10))
    part = config(train={"epoch_fraction": 0.25})
    assert (cost(config()), cost(part)) == (1.0, 0.25)
    # so it reaches a rung of the reference's second epoch after eight of its own
    assert rung_epochs(Rules(goals={"a": "maximize"}, first=2.0, reduction=4.0), 1, 40, cost(part)) == (8, 32)


def test_an_epoch_costs_its_passes_and_its_network() -> None:
    built = []

    def build(run: RunConfig) -> Network:
        built.append(run.model)
        return create(run, (1, 8, 8), 10)

    cost = epoch_costs(config(), build)
    assert cost(config()) == 1
    assert cost(config(method="sabr", attack_steps=8)) == pytest.approx(25 / 9)
    assert cost(config(model={"name": "mlp", "hidden": [128]})) == pytest.approx(2)
    assert cost(config(method="taps")) > cost(config(method="standard"))
    assert len(built) == 2


def study(folder: Path, cost: Any) -> Study:
    search = {"trials": 4, "sampler": "random", "scheduler": {"name": "asha"}}
    space = parse_space({**SPACE, "train": {"epochs": 20}, "search": search}, "course.yaml")
    found = Study(space, RunStore(folder), Records(), [0], cost=cost)
    found.begin({"name": "course", "seed": 0}, REFERENCE)
    return found


def test_the_cost_of_an_epoch_is_recorded_and_moves_the_rungs(tmp_path: Path) -> None:
    start = study(tmp_path, lambda run: 2.0).next_trial()
    assert start is not None
    assert start.asked == start.scored == (1, 2, 5, 14)
    assert read_records(tmp_path).trials[start.id].epoch_cost == 2.0


def test_a_configuration_whose_network_cannot_be_built_fails_and_the_next_is_drawn(tmp_path: Path) -> None:
    answers: list[Any] = [UserError("no such layer"), 1.0]

    def cost(run: RunConfig) -> float:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, Exception):
            raise found
        return float(found)

    start = study(tmp_path, cost).next_trial()
    assert start is not None
    assert start.id == "t0002"
    assert read_records(tmp_path).trials["t0001"].error == "no such layer"
