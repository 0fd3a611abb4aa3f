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
    Spent,
    accuracy_goals,
    epoch_costs,
    extreme_levels,
    proxy_goals,
    rung_epochs,
    scored_levels,
    steady,
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
    assert rung_epochs(Rules(goals={"a": "maximize"}), least, epochs, steady(cost)) == expected


def config(**values: Any) -> RunConfig:
    plain = {"data": {"name": "digits"}, "model": {"name": "mlp", "hidden": [64]}, "threat": {"epsilon": 0.1}}
    return parse(RunConfig, {**plain, "method": "ibp", **values})


def test_an_epoch_of_a_quarter_of_the_images_costs_a_quarter() -> None:
    cost = epoch_costs(config(), lambda run: create(run, (1, 8, 8), 10))
    part = config(train={"epoch_fraction": 0.25})
    assert (cost(config())(1), cost(part)(1)) == (1.0, 0.25)
    # so it reaches a rung of the reference's second epoch after eight of its own
    assert rung_epochs(Rules(goals={"a": "maximize"}, first=2.0, reduction=4.0), 1, 40, cost(part)) == (8, 32)


def test_an_epoch_costs_its_passes_and_its_network() -> None:
    built = []

    def build(run: RunConfig) -> Network:
        built.append(run.model)
        return create(run, (1, 8, 8), 10)

    cost = epoch_costs(config(), build)
    assert [cost(config())(epochs) for epochs in (1, 7, 30)] == [1, 7, 30]
    assert cost(config(method="sabr", attack_steps=8))(9) == pytest.approx(25)
    assert cost(config(model={"name": "mlp", "hidden": [128]}))(1) == pytest.approx(2)
    assert cost(config(method="taps"))(30) > cost(config(method="standard"))(30)
    assert len(built) == 2


def test_epochs_cost_what_their_stage_passes() -> None:
    cost = epoch_costs(config(method="sabr"), lambda run: create(run, (1, 8, 8), 10))
    staged = cost(config(method="c_sam", train={"epochs": 20}, stage_shares=[5, 10, 5]))
    assert [staged(epochs) for epochs in (5, 6, 15, 20)] == pytest.approx([5, 5 + 26 / 11, 5 + 260 / 11, 10 + 260 / 11])
    hydra = cost(config(method="hydra", train={"epochs": 20}))
    assert [hydra(epochs) for epochs in (1, 20)] == [1, 20]


def test_epochs_of_the_ramp_cost_what_its_loss_passes() -> None:
    cost = epoch_costs(config(method="sabr"), lambda run: create(run, (1, 8, 8), 10))
    train = {"epochs": 20, "warmup": 0.1, "ramp": 0.4}
    taps = cost(config(method="taps", train=train, latent_steps=10))
    # intervals up to epoch 10, the warm-up too; then the latent attack as well
    assert [taps(epochs) for epochs in (1, 10, 20)] == pytest.approx([9 / 11, 90 / 11, 90 / 11 + 290 / 11])


def study(folder: Path, cost: Any, records: Records | None = None) -> Study:
    search = {"trials": 4, "sampler": "random", "scheduler": {"name": "asha", "promote": False}}
    space = parse_space({**SPACE, "train": {"epochs": 20}, "search": search}, "course.yaml")
    found = Study(space, RunStore(folder), records or Records(), [0], cost=cost)
    if records is None:
        found.begin({"name": "course", "seed": 0}, REFERENCE)
    return found


def reported(study: Study, trial: str, epochs: int) -> list[tuple[float, float]]:
    """All rungs with resources at which a trial that goes on everywhere was judged, after so many epochs."""
    values = dict.fromkeys(study.rungs.halving.rules.metrics, 0.5)
    assert all(study.epoch(trial, epoch, 20, values) for epoch in range(1, epochs + 1))
    return [(decision.rung, decision.resource) for decision in study.rungs.halving.decisions]


def test_the_cost_of_an_epoch_is_recorded_and_moves_the_rungs(tmp_path: Path) -> None:
    start = study(tmp_path, lambda run: steady(2.0)).next_trial()
    assert start is not None
    assert start.asked == start.scored == (1, 2, 5, 14)
    assert read_records(tmp_path).trials[start.id].epoch_cost == 2.0


def test_rungs_lie_where_the_epochs_so_far_have_cost_them(tmp_path: Path) -> None:
    late = study(tmp_path, lambda run: lambda epochs: epochs if epochs < 5 else 4 + 10 * (epochs - 4))
    start = late.next_trial()
    assert start is not None
    assert start.asked == (1, 3, 5, 7, 12)
    assert reported(late, start.id, 19) == [(1, 1), (3, 3), (9, 14), (27, 34), (81, 84)]
    assert read_records(tmp_path).trials[start.id].epoch_cost == pytest.approx(164 / 20)


@pytest.mark.parametrize(("cost", "later"), [(0.4, []), (1.0, [(9, 9)]), (5.0, [(9, 10), (27, 30), (81, 85)])])
def test_a_run_that_counted_epochs_differently_goes_on(tmp_path: Path, cost: float, later: list[Any]) -> None:
    """As one of an earlier version may have: what was decided stands, and no rung is asked twice."""
    first = study(tmp_path, lambda run: steady(1.0))
    start = first.next_trial()
    assert start is not None
    before = reported(first, start.id, 4)
    assert before == [(1, 1), (3, 3)]
    second = study(tmp_path, lambda run: steady(cost), read_records(tmp_path))
    again = second.next_trial()
    assert again is not None
    assert (again.id, again.epoch) == (start.id, 0)
    assert reported(second, start.id, 19) == before + later
    record = read_records(tmp_path).trials[start.id]
    assert (record.epoch_cost, [(d.rung, d.resource) for d in record.rungs]) == (1.0, before + later)


def test_a_configuration_whose_network_cannot_be_built_fails_and_the_next_is_drawn(tmp_path: Path) -> None:
    answers: list[Any] = [UserError("no such layer"), 1.0]

    def cost(run: RunConfig) -> Spent:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, Exception):
            raise found
        return steady(found)

    start = study(tmp_path, cost).next_trial()
    assert start is not None
    assert start.id == "t0002"
    assert read_records(tmp_path).trials["t0001"].error == "no such layer"
