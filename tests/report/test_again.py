"""The front, seen again: fresh samples and other seeds, on the page, in the terminal and in the figure."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from studies import events, points_of, small_space, write_run
from test_page import read

from cactus_ray.report.again import SHOWN_POINTS, again_figure, again_lines, again_notes
from cactus_ray.report.page import write_page
from cactus_ray.report.progress import StudyProgress
from cactus_ray.report.terminal import print_front, print_status, status_table
from cactus_ray.search.replicates import seen_again
from cactus_ray.search.space import Space
from cactus_ray.search.store import read_records, with_front
from cactus_ray.verification.verdict import wilson

LEADER, QUALITY = "t0006", 90
NONE_FRESH = "no fresh samples: all 287 <b>of the selection split</b> were verified on"


def later(space: Space) -> Iterator[dict[str, Any]]:
    """A study whose leader was trained again twice and seen on 60 fresh samples, a little worse each time."""
    for event in events(space):
        if event["event"] == "finished":
            yield from _after(space)
        yield event


def _after(space: Space) -> Iterator[dict[str, Any]]:
    fresh = []
    for point in points_of(LEADER, "sabr", QUALITY):
        counts = {"samples": 60, "n_certified": 48, "n_falsified": 9, "n_unknown": 3, "certified_accuracy": 0.8}
        fresh.append({**point, **counts, "split": "selection-fresh", "standard_accuracy": 0.9})
    ledger = {"ibp": 2.0}
    levels = {p["level"]: {"samples": [[1, 0, "CERTIFIED", True, 0.1, "ibp", 0.1]], "measures": {}} for p in fresh}
    yield {"event": "fresh", "trial": LEADER, "stage": "cheap", "chunk": "f", "levels": levels, "ledger": ledger}
    yield {"event": "reevaluated", "trial": LEADER, "points": fresh}
    for number, quality in ((2, QUALITY - 4), (3, QUALITY - 2)):
        name = f"{LEADER}-s{number}"
        yield {
            "event": "started", "trial": name, "number": 6, "parameters": {"method": "sabr"}, "seed": 77,
            "origin": "replicate", "of": LEADER, "replicate": number, "config": {}, "config_hash": "0" * 16,
        }  # fmt: skip
        points = points_of(name, "sabr", quality)
        points = [{**p, "bytes": p["bytes"] - quality + QUALITY} for p in points]
        yield {"event": "completed", "trial": name, "of": LEADER, "points": points, "metrics": {"mean": 0.5}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = small_space()
    folder = write_run(tmp_path_factory.mktemp("run") / "digits", space, later(space))
    write_page(folder)
    return folder


def seen(run: Path) -> list[dict[str, Any]]:
    records, front = read_records(run), small_space().front
    return seen_again(records, with_front(records, front), front)


def test_the_figure_draws_both_estimates_of_a_point_linked_and_the_spread_of_seeds(run: Path) -> None:
    figure = read(run / "report.html")[1].script("figures")["again"]
    link, search, fresh, seeds = figure["data"]
    levels = [p["level"] for p in sorted(seen(run), key=lambda p: p["bytes"]) if p["trial"] == LEADER]
    assert figure["layout"]["yaxis"]["ticktext"] == [f"{LEADER} · {level}" for level in levels]
    place = levels.index("int8")
    low, high = wilson(QUALITY - 4, 100)
    assert search["x"][place] == pytest.approx(0.86)
    assert search["error_x"]["array"][place] == pytest.approx(high - 0.86)
    assert search["error_x"]["arrayminus"][place] == pytest.approx(0.86 - low)
    low, high = wilson(48, 60)
    assert fresh["x"][place] == pytest.approx(0.8)
    assert fresh["error_x"]["array"][place] == pytest.approx(high - 0.8)
    assert link["x"][3 * place : 3 * place + 3] == [search["x"][place], fresh["x"][place], None]
    assert link["y"][3 * place : 3 * place + 2] == [search["y"][place], fresh["y"][place]]
    assert seeds["x"][place] == pytest.approx(0.84)
    assert seeds["error_x"]["array"][place] == pytest.approx(0.02)
    assert seeds["error_x"]["arrayminus"][place] == pytest.approx(0.02)


def test_the_table_has_a_row_per_point_seen_again(run: Path) -> None:
    text, _ = read(run / "report.html")
    table = text[text.index('id="again-points"') : text.index("</table>", text.index('id="again-points"'))]
    assert table.count("<tr") == 1 + sum(p["on_front"] for p in seen(run) if p["trial"] == LEADER)
    assert "-6.0" in table  # int8: 80 % instead of 86 %
    assert "82.0% - 86.0%" in table


def test_replicates_are_in_no_other_figure_or_number(run: Path) -> None:
    text, elements = read(run / "report.html")
    figures = {**elements.script("figures"), "parallel": elements.script("parallel-data")}
    for name in ("front", "curves", "slices-0", "slices-1", "parallel"):
        assert f"{LEADER}-s2" not in json.dumps(figures[name])
    assert "4 of 6" in text
    assert "2 of 2 replicates" in text
    assert "seed 2 of t0006" in text


def test_the_front_is_printed_with_what_was_found_out(run: Path) -> None:
    where = Console(file=io.StringIO(), width=200)
    print_front(where, run, read_records(run), as_json=False)
    print_status(where, run, read_records(run), as_json=False)
    where.print(status_table(read_records(run)))
    text = where.file.getvalue()  # type: ignore[attr-defined]
    assert "on 60 fresh samples, 3 of" in text
    assert "points lower on average" in text
    assert "over up to 3 seeds" in text
    assert "replicates: 2 completed" in text
    assert "of 6 trials 4 completed, 1 stopped, 1 failed" in text


def test_lines_of_one_point_name_samples_and_spread(run: Path) -> None:
    (point,) = (p for p in seen(run) if (p["trial"], p["level"]) == (LEADER, "int8"))
    first, second = again_lines(point)
    assert first.startswith("on 60 fresh samples: 80.0% certified [")
    assert "over 3 seeds: certified_accuracy 0.84 (0.82 to 0.86)" in second
    assert second.endswith(point["over_seeds"])


def test_that_nothing_is_fresh_is_said_once_on_the_page_and_once_in_the_terminal(tmp_path: Path) -> None:
    space = small_space()
    lines = [{**e, "none_fresh": NONE_FRESH} if e["event"] == "study" else e for e in events(space)]
    folder = write_run(tmp_path / "run", space, lines)
    where = Console(file=io.StringIO(), width=200)
    print_front(where, folder, read_records(folder), as_json=False)
    assert where.file.getvalue().count(NONE_FRESH) == 1  # type: ignore[attr-defined]
    text, elements = read(write_page(folder))
    assert text.count("No fresh samples: all 287 &lt;b&gt;of the selection split") == 1
    assert "again" not in elements.script("figures")
    assert "again-points" not in text


def test_a_run_of_before_says_nothing(tmp_path: Path) -> None:
    space = small_space()
    folder = write_run(tmp_path / "run", space, events(space))
    assert "seen again" not in read(write_page(folder))[0]
    assert again_notes(read_records(folder), with_front(read_records(folder), space.front)) == []


def test_a_large_front_is_cut_in_the_figure() -> None:
    points = [
        {**p, "trial": f"t{i:04d}", "on_front": True, "fresh_samples": 10, "fresh_n_certified": 5,
         "fresh_certified_accuracy": 0.5}
        for i in range(60) for p in points_of(f"t{i:04d}", "sabr", 60)[:1]
    ]  # fmt: skip
    figure = again_figure(points, 0.1)
    assert len(figure.layout.yaxis.ticktext) == SHOWN_POINTS


def test_progress_counts_no_replicate_as_a_trial(tmp_path: Path) -> None:
    space = small_space()
    where = Console(file=io.StringIO(), width=200)
    progress = StudyProgress(space, read_records(write_run(tmp_path / "run", space, later(space))), console=where)
    before, leading = progress.ended, len(progress.leading.points)
    for event in _after(space):
        progress.event(event)
    text = where.file.getvalue()  # type: ignore[attr-defined]
    assert (progress.ended, len(progress.leading.points)) == (before, leading) == (6, 6)
    assert "t0006-s2 started: seed 2 of t0006" in text
    assert "t0006-s2 complete: a replicate of t0006" in text
    assert "t0006 int8: 80.0% certified on 60 fresh samples" in text


def test_points_without_fresh_verdicts_are_counted_with_their_reason(tmp_path: Path) -> None:
    space = small_space()
    levels = [p["level"] for p in points_of(LEADER, "sabr", QUALITY)]
    failure = {"event": "reevaluated", "trial": LEADER, "points": [], "error": "out of memory", "levels": levels[:1]}
    folder = write_run(tmp_path / "digits", space, [*events(space), failure])
    records = read_records(folder)
    points = seen_again(records, with_front(records, space.front), space.front)
    front = [p for p in points if p["on_front"]]
    note = f"1 of {len(front)} points of the front have no verdicts on fresh samples ({LEADER}: out of memory)"
    assert again_notes(records, points) == [note]
    (point,) = (p for p in points if "fresh_error" in p)
    assert (point["trial"], point["level"]) == (LEADER, levels[0])
    assert again_lines(point) == ["not verified on fresh samples: out of memory"]
