"""Slices and where compute went: every complete trial, nothing else, constraints apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import events, small_space, write_run

from cactus_ray.report import insight
from cactus_ray.report.page import broken_trials, write_page
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, read_records, with_front


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space(7)


@pytest.fixture(scope="module")
def run(space: Space, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "digits", space, events(space))


@pytest.fixture(scope="module")
def records(run: Path) -> Records:
    found = read_records(run)
    found.trials["t0004"].metrics["standard_accuracy@int8"] = 0.5  # at least 0.9 is asked for
    return found


def test_slices_draw_each_complete_trial_once_per_parameter_that_it_has(space: Space, records: Records) -> None:
    complete = insight.complete_trials(space, records)
    assert [t.trial for t in complete] == ["t0001", "t0004", "t0005", "t0006", "t0007"]
    parameters = insight.varied(space, complete)
    asked = sum(p.name in t.values for p in parameters for t in complete)
    for objective in space.objectives:
        figure = insight.slices_figure(space, complete, objective.metric)
        assert sum(len(trace.x) for trace in figure.data) == asked
        drawn = {y for trace in figure.data for y in trace.y}
        assert drawn == {t.objectives[objective.metric] for t in complete}
    apart = [trace for trace in figure.data if trace.name == "constraints not met"]
    assert {text.split(":")[0] for trace in apart for text in trace.text} == {"t0004"}


def test_compute_is_split_by_what_became_of_it(space: Space, records: Records) -> None:
    leading = {p["trial"] for p in with_front(records, space.front) if p["on_front"]}
    spent = insight.compute(records, leading)
    assert spent["training: failed trials"] == pytest.approx(1.5 + 1.0)  # an epoch, and a second until it failed
    assert spent["training: stopped trials"] == pytest.approx(1.5)
    assert spent["training: trials on the front"] == pytest.approx(9.0 * len(leading))
    assert spent["verification: attack"] == pytest.approx(0.9 * 5)
    total = sum(seconds for name, seconds in spent.items() if name.startswith("training"))
    assert total == pytest.approx(5 * 9.0 + 4.0)
    bars = insight.compute_figure(spent).data[0]
    assert sum(bars.x) == pytest.approx(sum(spent.values()))


def test_broken_trials_are_marked_on_the_front_and_the_page_shows_all(
    space: Space, records: Records, run: Path
) -> None:
    assert broken_trials(space, records) == {"t0004"}
    text = write_page(run).read_text()
    for identifier in ("slices-0", "parallel", "compute"):
        assert f'id="{identifier}"' in text
    assert "hours of CPUs" in text


def test_one_trial_has_nothing_to_compare(space: Space) -> None:
    assert insight.complete_trials(space, Records()) == []
    assert insight.varied(space, []) == []


def test_numbers_that_can_be_chosen_are_shown_by_size_and_words_as_written(space: Space) -> None:
    asked = parse_space(
        {
            **space.to_dict(),
            "parameters": {
                "method": {"values": ["sabr", "cactus"]},
                "awp_radius": {"values": [0.0, 0.5, 1.0, 0.25], "when": {"method": ["cactus"]}},
            },
        }
    )
    values = [{"method": "cactus", "awp_radius": r} for r in (1.0, 0.25, 0.0)] + [{"method": "sabr"}]
    trials = [
        insight.Complete(f"t{i}", v, {o.metric: 0.5 for o in asked.objectives}, True) for i, v in enumerate(values)
    ]
    figure = insight.slices_figure(asked, trials, asked.objectives[0].metric)
    by_title = {axis.title.text: list(axis.categoryarray) for axis in figure.select_xaxes()}
    assert by_title == {"method": ["sabr", "cactus"], "awp_radius": ["0", "0.25", "0.5", "1"]}
