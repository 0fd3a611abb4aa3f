"""Points of a space come first, suggestions come next, and neither is tried twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from course import SPACE as COURSE
from course import begin, started
from test_sampler import SPACE, records_of

from cactus_ray.errors import ConfigError
from cactus_ray.search.points import FILE, Suggested, check_point, suggest
from cactus_ray.search.sampler import OptunaSampler, Suggestion
from cactus_ray.search.space import Space, load_space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
POINTS: list[dict[str, Any]] = [
    {"method": "sabr", "learning_rate": 0.01, "model": {"hidden": [64, 32]}},
    {"method": "cactus", "awp_radius": 0.5, "standard_weight": 0.25},
]


def space(points: list[dict[str, Any]] | None = None, sampler: str = "tpe", **overrides: str) -> Space:
    search = {"sampler": sampler, "trials": 20, "points": POINTS if points is None else points}
    return parse_space({**SPACE, "search": search}, overrides=overrides)


def asked(sampler: OptunaSampler) -> Suggestion:
    found = sampler.ask()
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_points_are_tried_first_and_what_they_leave_out_is_drawn(name: str) -> None:
    sampler = OptunaSampler(space(sampler=name))
    first, second, third = (asked(sampler) for _ in range(3))
    assert (first.origin, second.origin, third.origin) == ("point", "point", "sampler")
    assert first.values["model.hidden"] == (64, 32)
    assert first.values["learning_rate"] == 0.01
    assert "awp_radius" not in first.values
    assert (second.values["method"], second.values["awp_radius"]) == ("cactus", 0.5)
    assert 16 <= first.values["train.batch_size"] <= 256


@pytest.mark.parametrize("cut", [1, 2])
def test_a_resumed_search_goes_on_with_the_points_that_are_left(cut: int) -> None:
    whole = OptunaSampler(space())
    suggestions = [asked(whole) for _ in range(4)]
    resumed = OptunaSampler(space())
    resumed.replay(records_of(suggestions[:cut], lambda n: "running"))
    assert [asked(resumed).values for _ in range(4 - cut)] == [s.values for s in suggestions[cut:]]


def test_a_space_with_points_reads_back_as_it_was_written() -> None:
    once = space()
    assert parse_space(once.to_dict()) == once
    assert once.to_dict()["search"]["points"][0]["model.hidden"] == [64, 32]


def test_what_is_fixed_by_hand_takes_the_points_along_or_out() -> None:
    assert [p.get("awp_radius") for p in space(method="cactus").points] == [0.5]  # the other point is of sabr
    assert space(learning_rate="0.01").points[0] == {"method": "sabr", "model.hidden": (64, 32)}


def test_points_can_be_given_or_taken_away_by_hand() -> None:
    assert space(**{"search.points": "[{method: sabr, standard_weight: 0.5}]"}).points == (
        {"method": "sabr", "standard_weight": 0.5},
    )
    assert space(**{"search.points": "null"}).points == ()
    with pytest.raises(ConfigError, match=r"--set search\.points\[0\]\.method"):
        space(**{"search.points": "[{method: ibp}]"})


@pytest.mark.parametrize(
    ("point", "place", "hint"),
    [
        ({"method": "ibp"}, "search.points[0].method", "cactus, sabr"),
        ({"learning_rate": 7.0}, "search.points[0].learning_rate", "0.001 to 1.0"),
        ({"learning_rat": 0.1}, "search.points[0].learning_rat", "a searched parameter"),
        ({"method": "sabr", "awp_radius": 0.5}, "search.points[0].awp_radius", "only with method cactus, not sabr"),
        ({}, "search.points[0]", "a list of mappings"),
        ({"learning_rate": "fast"}, "search.points[0].learning_rate", "a finite number"),
    ],
)
def test_points_that_could_not_be_drawn_are_refused(point: dict[str, Any], place: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space([point])
    assert caught.value.path == place
    assert hint in str(caught.value)


def test_an_option_that_the_method_of_a_point_does_not_read_is_refused() -> None:
    parameters = {"method": {"values": ["ibp", "sabr"]}, "box_ratio": {"min": 0.1, "max": 0.9}}
    data = {**SPACE, "parameters": parameters, "search": {"points": [{"method": "ibp", "box_ratio": 0.5}]}}
    with pytest.raises(ConfigError, match="method ibp does not read it"):
        parse_space(data)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_space_begins_with_the_papers_settings(path: Path) -> None:
    shipped = load_space(path)
    first = asked(OptunaSampler(shipped))
    assert first.origin == "point"
    config = shipped.configuration(first.values, 1)
    assert config.method == "cactus"
    assert config.compression_set is not None
    assert config.compression_set.strategy == "single"


# --- suggestions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path: Path) -> Study:
    return begin(parse_space(COURSE, "course.yaml"), tmp_path)


def test_a_suggestion_is_the_next_trial_and_is_taken_once(course: Study, tmp_path: Path) -> None:
    started(course)
    suggest(tmp_path, {"learning_rate": 0.004})
    trial = started(course)
    assert trial.config.learning_rate == 0.004
    record = read_records(tmp_path).trials[trial.id]
    assert (record.origin, record.parameters) == ("suggested", {"learning_rate": 0.004})
    assert started(course).config.learning_rate != 0.004
    later = Study(course.space, course.store, read_records(tmp_path), [0, 1, 2])  # reads the queue from its beginning
    for _ in range(3):
        assert started(later).config.learning_rate  # the three trials that were in flight
    assert later.next_trial() is None


def test_lines_that_do_not_fit_are_left_out_and_torn_ones_wait(
    course: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Suggested(tmp_path, course.space)
    assert queue.new() == []
    file = tmp_path / FILE
    file.write_text('{"values": {"learning_rate": 9}}\nnonsense\n{"values": {"learning_rate": 0.002}}\n{"values": {"le')
    assert queue.new() == [{"learning_rate": 0.002}]
    assert "0.001 to 0.01" in caplog.text
    with file.open("a") as more:
        more.write('arning_rate": 0.003}}\n')
    assert queue.new() == [{"learning_rate": 0.003}]


def test_values_that_the_study_fixes_may_be_repeated_but_not_changed() -> None:
    fixed = space(method="sabr")
    assert check_point(fixed, {"method": "sabr", "learning_rate": 0.1}) == {"learning_rate": 0.1}
    with pytest.raises(ConfigError, match="which is fixed in this study"):
        check_point(fixed, {"method": "cactus"}, "--set ")
    with pytest.raises(ConfigError, match="only with method cactus"):
        check_point(space(), {"method": "sabr", "awp_radius": 0.5}, "--set ")
