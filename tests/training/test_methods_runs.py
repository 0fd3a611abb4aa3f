"""The benchmark of methods: epochs that cost the same."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from cactus_ray.training import bench
from cactus_ray.training.passes import estimated_units


@pytest.fixture(scope="module")
def runs(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("methods_runs")


def test_epochs_cost_the_same_over_warm_up_ramp_and_stages(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a step's seconds were its passes."""

    def passes(call: Any, *rest: Any, **options: Any) -> float:
        mine = getattr(call, "__self__", None)
        return 1.0 if mine is None else estimated_units(mine.run.config, mine.run.graph, mine.run.params, mine.phase)

    monkeypatch.setattr(bench, "_timed", passes)
    plan = runs.Plan.of("digits", None, 40, False, 64, "cpu")
    costs = runs.step_seconds(plan, ["sabr", "taps", "crown_ibp", "c_sam"], ["sabr"])
    # warm-up 0.02, ramp 0.3; c_sam pretrains a quarter of the epochs and searches its mask in half of them
    whole = {
        "sabr": 0.02 * 3 + 0.98 * 11,
        "taps": 0.02 * 3 + 0.3 * 9 + 0.68 * 29,
        "crown_ibp": 0.02 * 3 + 0.3 * 12 + 0.68 * 9,
        "c_sam": 0.25 * (0.02 * 3 + 0.98 * 11) + 0.5 * 26 + 0.25 * 11,
    }
    assert {method: found[0] for method, found in costs.items()} == pytest.approx(whole)
    assert len(costs["sabr"]) == 6
    assert {method: runs.epochs_of(plan, costs, method, 0) for method in whole} == {
        "sabr": 40, "taps": 19, "crown_ibp": 44, "c_sam": 23,
    }  # fmt: skip


def test_costs_of_another_day_are_kept_in_the_seconds_of_the_first(runs: ModuleType) -> None:
    known: dict[str, list[float]] = {}
    runs.add_costs(known, {"sabr": [2.0, 2.0], "cactus": [3.0, 4.0]})
    assert known == {"sabr": [2.0, 2.0], "cactus": [3.0, 4.0]}
    runs.add_costs(known, {"sabr": [3.0, 3.0], "cactus": [9.0, 9.0], "taps": [6.0]})  # a machine half as busy again
    assert known == {"sabr": [2.0, 2.0], "cactus": [3.0, 4.0], "taps": [4.0]}


def test_a_variant_is_its_method_with_another_set(runs: ModuleType) -> None:
    plan = runs.Plan.of("digits", None, None, False, None, "cpu")
    plain, varied = (
        plan.config(method, runs.settings("digits", method)[0], 3, 0).to_dict()
        for method in ("cactus", "cactus_channels")
    )
    assert varied["compression_set"] == plain["compression_set"] | {"channels": 0.7}
    assert {k: v for k, v in varied.items() if k != "compression_set"} == {
        k: v for k, v in plain.items() if k != "compression_set"
    }
