"""Figures: order, ends of intervals, escaped texts, legible numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from studies import points_of

from cactus_ray.report import figures


def curve(trial: str, quality: int, on_front: bool) -> list[dict[str, Any]]:
    return [{**point, "on_front": on_front} for point in points_of(trial, "cactus", quality)]


def test_interval_reaches_from_certified_to_not_falsified() -> None:
    point = points_of("t0001", "cactus", 80)[0]
    assert figures.upper_end(point) == pytest.approx(0.83)
    assert figures.upper_end({**point, "n_falsified": 0}) == 1.0


def test_step_line_never_falls_and_skips_points_on_the_front_for_another_reason() -> None:
    points = curve("t0001", 80, True)
    points.append({**points[0], "bytes": 99_000, "certified_accuracy": 0.1, "n_certified": 10, "n_falsified": 87})
    line = next(trace for trace in figures.front_figure(points, 0.1).data if trace.mode == "lines")
    assert list(line.y) == [0.72, 0.76, 0.8, 0.8]
    assert line.x[-1] == 99_000


def test_texts_of_users_are_escaped_everywhere() -> None:
    bad = "<a href='http://evil.example'>x</a>"
    points = [{**point, "trial": bad, "method": bad, "level": bad} for point in curve("t0001", 80, True)]
    epochs = [{"epoch": 1, "metrics": {"loss": 1.0}}]
    for figure in (
        figures.front_figure(points, 0.1),
        figures.curves_figure(points),
        figures.importances_figure({bad: {bad: 1.0}}),
        figures.cost_figure({bad: (1.0, 2.0)}),
        figures.training_figure({bad: epochs}, "loss"),
    ):
        assert "<a" not in figure.to_json().replace("\\u003c", "<")


def test_many_curves_start_with_those_that_reach_the_front() -> None:
    points = [p for i in range(40) for p in curve(f"t{i:04d}", 60 + i % 20, i == 3)]
    traces = figures.curves_figure(points).data
    assert [trace.name for trace in traces if trace.visible is True] == ["t0003 ★"]


def test_epochs_without_a_finite_value_leave_a_gap() -> None:
    values = [1.0, math.nan, None, 0.5]
    epochs = [{"epoch": i, "metrics": {"loss": value}} for i, value in enumerate(values)]
    assert list(figures.training_figure({"t0001": epochs}, "loss").data[0].y) == [1.0, None, None, 0.5]
    assert not figures.training_figure({"t0001": epochs}, "absent").data


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999"), (1_000, "1 k"), (37_190, "37.2 k"), (2_500_000, "2.5 M"), (3e9, "3 G")]
)
def test_sizes(size: float, text: str) -> None:
    assert figures.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.4, "59 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration_text(seconds) == text
