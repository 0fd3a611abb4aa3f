"""Parallel coordinates: a line per complete trial, places on axes of every kind, inactive parameters; and ticks."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from studies import small_space

from cactus_ray.report import parallel, ticks
from cactus_ray.report.insight import Complete
from cactus_ray.search.space import Space, parse_space


@pytest.fixture(scope="module")
def space() -> Space:
    return parse_space(
        {
            **small_space().to_dict(),
            "parameters": {
                "method": {"values": ["sabr", "cactus"]},
                "learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1},
                "awp_radius": {"values": [0.5, 0.0, 1.0, 0.25], "when": {"method": ["cactus"]}},
                "train.epochs": {"distribution": "int_uniform", "min": 3, "max": 5},
            },
            "objectives": [{"metric": "mean_certified_accuracy"}, {"metric": "bytes@int8", "goal": "minimize"}],
        }
    )


def trial(number: int, certified: float, values: dict[str, Any], met: bool = True) -> Complete:
    objectives = {"mean_certified_accuracy": certified, "bytes@int8": 10_000.0 + number}
    return Complete(f"t{number:04d}", values, objectives, met)


TRIALS = [
    trial(1, 0.5, {"method": "cactus", "learning_rate": 0.01, "awp_radius": 0.0, "train.epochs": 3}),
    trial(2, 0.9, {"method": "sabr", "learning_rate": 0.001, "train.epochs": 5}),
    trial(3, 0.7, {"method": "cactus", "learning_rate": 0.1, "awp_radius": 1.0, "train.epochs": 4}, met=False),
]


def by_axis(data: dict[str, Any], key: str) -> dict[str, list[Any]]:
    return {axis["name"]: [line[key][i] for line in data["lines"]] for i, axis in enumerate(data["axes"])}


def test_a_line_goes_through_the_values_and_objectives_of_its_trial(space: Space) -> None:
    data = parallel.parallel_data(space, TRIALS, {"t0002"})
    places, texts = by_axis(data, "places"), by_axis(data, "texts")
    assert [line["trial"] for line in data["lines"]] == ["t0001", "t0002", "t0003"]
    assert [line["front"] for line in data["lines"]] == [False, True, False]
    assert places["learning_rate"] == pytest.approx([0.5, 0.0, 1.0])  # logarithmic
    assert places["train.epochs"] == [0.0, 1.0, 0.5]
    assert places["mean_certified_accuracy"] == pytest.approx([0.0, 1.0, 0.5])
    assert texts["mean_certified_accuracy"] == ["50.0%", "90.0%", "70.0%"]
    assert texts["bytes@int8"] == ["10,001", "10,002", "10,003"]
    assert texts["constraints"] == ["met", "met", "not met"]
    assert [(data["axes"][c["axis"]]["name"], c["goal"]) for c in data["colours"]] == [
        ("mean_certified_accuracy", "maximize"),
        ("bytes@int8", "minimize"),
    ]
    json.dumps(data, allow_nan=False)


def test_an_inactive_parameter_has_no_place_and_no_value(space: Space) -> None:
    data = parallel.parallel_data(space, TRIALS, set())
    assert by_axis(data, "places")["awp_radius"] == [0.0, None, 1.0]
    assert by_axis(data, "texts")["awp_radius"] == ["0", None, "1"]


def test_choices_stand_as_written_and_numbers_by_size(space: Space) -> None:
    axes = {axis["name"]: axis["ticks"] for axis in parallel.parallel_data(space, TRIALS, set())["axes"]}
    assert axes["method"] == [(0.0, "cactus"), (1.0, "sabr")]  # the first on top
    assert [text for _, text in axes["awp_radius"]] == ["0", "0.25", "0.5", "1"]
    assert [text for _, text in axes["learning_rate"]] == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    assert [text for _, text in axes["train.epochs"]] == ["3", "4", "5"]


def test_values_that_the_space_no_longer_has_and_results_that_are_not_finite_do_no_harm(space: Space) -> None:
    strange = trial(4, math.nan, {"method": "ibp", "learning_rate": 0.5, "train.epochs": 9})
    data = parallel.parallel_data(space, [*TRIALS, strange], set())
    assert by_axis(data, "texts")["method"][-1] == "ibp"
    assert by_axis(data, "places")["learning_rate"][-1] == 1.0
    assert by_axis(data, "places")["mean_certified_accuracy"][-1] is None
    json.dumps(data, allow_nan=False)


def test_of_very_many_trials_those_on_the_front_and_the_best_are_drawn(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SHOWN_LINES", 2)
    data = parallel.parallel_data(space, TRIALS, {"t0001"})
    assert [line["trial"] for line in data["lines"]] == ["t0001", "t0002"]
    assert data["complete"] == 3


@pytest.mark.parametrize(
    "name", ["method", "compression_set.strategy", "mean_certified_accuracy", "certified_accuracy@prune:gu-l1:0.9+int8"]
)
def test_labels_keep_every_character_in_lines_that_fit(name: str) -> None:
    lines = parallel.label(name)
    assert "".join(lines) == name
    assert all(0 < len(line) <= parallel.LABEL_WIDTH for line in lines)


@pytest.mark.parametrize(
    ("low", "high", "log", "whole", "values"),
    [
        (0.0, 1.0, False, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.43, 0.47, False, False, [0.43, 0.44, 0.45, 0.46, 0.47]),
        (3, 5, False, True, [3, 4, 5]),
        (0.0005, 0.02, True, False, [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02]),
        (1e-6, 1.0, True, False, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
        (0.31, 0.38, True, False, [0.32, 0.34, 0.36, 0.38]),
        (7.0, 7.0, False, False, [7.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, whole: bool, values: list[float]) -> None:
    assert ticks.tick_values(low, high, log=log, whole=whole) == pytest.approx(values)


@pytest.mark.parametrize("exponent", range(-12, 13))
def test_an_axis_has_a_few_ticks_whatever_its_scale(exponent: int) -> None:
    for start, factor in ((0.0, 1.0), (1.0, 1.37), (2.9, 500.0), (1.0, 1e9)):
        low, high = start * 10.0**exponent, (start + factor) * 10.0**exponent
        found = ticks.tick_values(low, high)
        assert 3 <= len(found) <= ticks.TICKS + 1
        if low > 0:
            found = ticks.tick_values(low, high, log=True)
            assert 2 <= len(found) <= ticks.TICKS + 1
        assert found == sorted(set(found))
        assert low * (1 - 1e-6) <= found[0]
        assert found[-1] <= high * (1 + 1e-6)
