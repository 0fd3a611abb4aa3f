"""The page in a real browser: every chart is drawn, nothing is complained of, nothing leaves the page.

Playwright's Python package drives the Chromium that the system has (``bash launch/setup.sh dev,browser`` and, on
Debian, ``apt-get install chromium``); no browser is downloaded. Without either these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from studies import events, parse_space, small_space, write_run
from test_again import later
from test_page import HOSTILE, read

from cactus_ray.report.page import write_page
from cactus_ray.search.space import Space

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: bash launch/setup.sh dev,browser")

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update",
)  # fmt: skip
WIDE, PHONE = (1280, 900), (390, 844)
EVERY_CHART = {
    "front", "again", "curves", "importances", "slices-0", "slices-1", "parallel", "cost", "compute",
    "training-loss", "training-standard_accuracy", "training-ibp_certified_accuracy",
}  # fmt: skip

# Of every Plotly chart: how many marks of each kind are drawn with a size, within the chart's own box.
DRAWN = """(chart) => {
  const frame = chart.getBoundingClientRect();
  const seen = (selector, size = Math.min) => Array.from(chart.querySelectorAll(selector)).filter((mark) => {
    const box = mark.getBoundingClientRect();
    return size(box.width, box.height) > 0 && box.left >= frame.left - 1 && box.right <= frame.right + 1;
  }).length;
  return {
    markers: seen(".scatterlayer .trace .point"), lines: seen(".scatterlayer .trace .js-line", Math.max),
    bars: seen(".barlayer .point path"), texts: seen("text"),
  };
}"""


@dataclass(slots=True)
class Visit:
    """A page that was loaded, all that its console said, and all that it asked for beside itself."""

    page: Any
    address: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def chart(self, name: str) -> Any:
        return self.page.locator(f".chart[id='{name}']")

    def evaluate(self, name: str, function: str) -> Any:
        return self.chart(name).evaluate(function)

    def is_silent(self) -> None:
        assert self.complaints == []
        assert self.requests == []
        assert self.dialogs == []


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on the path: none of {', '.join(BROWSERS)}")
    arguments = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments, timeout=0)
        yield browser
        browser.close()


def visit(browser: Any, path: Path, size: tuple[int, int]) -> Visit:
    """Load a page; every request but for the page itself is refused and noted."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(0)  # a loaded machine is no failure; pytest ends what hangs
    seen = Visit(page, path.resolve().as_uri())

    def answer(route: Any) -> None:
        if route.request.url == seen.address:
            route.continue_()
        else:
            seen.requests.append(route.request.url)
            route.abort()

    page.route("**/*", answer)
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective, e.sample))"
    )
    page.goto(seen.address)
    return seen


def space() -> Space:
    """Axes of every kind: words, numbers to choose from, a range, a logarithmic one, integers, conditions."""
    when = {"method": ["cactus"]}
    return parse_space(
        {
            **small_space(14).to_dict(),
            "parameters": {
                "method": {"values": ["cactus", "sabr"]},
                "learning_rate": {"distribution": "log_uniform_values", "min": 0.0005, "max": 0.02},
                "standard_weight": {"min": 0.1, "max": 0.7},
                "awp_radius": {"values": [1.0, 0.0, 0.5], "when": when},
                "compression_set.strategy": {"values": ["single", "triple"], "when": when},
                "train.epochs": {"distribution": "int_uniform", "min": 3, "max": 30},
            },
            "objectives": [{"metric": "mean_certified_accuracy"}, {"metric": "bytes@int8", "goal": "minimize"}],
            "search": {"trials": 14, "sampler": "random", "scheduler": {"name": "asha"}},
        }
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with a failed and a stopped trial, conditions, constraints, fresh samples and replicates."""
    return write_page(write_run(tmp_path_factory.mktemp("run") / "digits", space(), list(later(space()))))


@pytest.fixture(scope="module", params=[WIDE, PHONE], ids=["wide", "phone"])
def seen(request: pytest.FixtureRequest, chromium: Any, report: Path) -> Iterator[Visit]:
    found = visit(chromium, report, request.param)
    yield found
    found.page.close()


def marks(figure: dict[str, Any]) -> dict[str, int]:
    """What a Plotly chart must draw: markers one by one, at least a line per trace, bars that have a length."""
    shown = [trace for trace in figure["data"] if trace.get("visible", True) is True]
    scatter = [trace for trace in shown if trace["type"] == "scatter"]
    return {
        "markers": sum(len(t["x"]) for t in scatter if "markers" in t["mode"]),
        "lines": sum("lines" in t["mode"] for t in scatter),
        "bars": sum(value > 0 for t in shown if t["type"] == "bar" for value in t["x" if "orientation" in t else "y"]),
    }


def test_every_chart_is_drawn_whole(seen: Visit, report: Path) -> None:
    figures = read(report)[1].script("figures")
    assert {chart.get_attribute("id") for chart in seen.page.locator(".chart").all()} == EVERY_CHART
    assert set(figures) == EVERY_CHART - {"parallel"}
    for name, figure in figures.items():
        wanted, drawn = marks(figure), seen.evaluate(name, DRAWN)
        assert sum(wanted.values()) > 0, name
        assert drawn["markers"] == wanted["markers"], name
        assert drawn["lines"] >= wanted["lines"], name
        assert drawn["bars"] == wanted["bars"], name
        assert drawn["texts"] > 3, name


def test_parallel_coordinates_have_a_visible_line_per_complete_trial(seen: Visit, report: Path) -> None:
    data = read(report)[1].script("parallel-data")
    drawn = seen.evaluate(
        "parallel",
        """(chart) => Array.from(chart.querySelectorAll(".line"), (line) => {
          const box = line.getBoundingClientRect(), style = getComputedStyle(line);
          return [line.dataset.trial, box.width, box.height, style.stroke, line.querySelectorAll(".dashed").length];
        })""",
    )
    absent = {line["trial"]: None in line["places"] for line in data["lines"]}
    assert {trial: bool(dashed) for trial, *_, dashed in drawn} == absent
    assert len(absent) == 12
    assert len(set(absent.values())) == 2
    assert all(width > 300 and height > 0 and stroke.startswith("rgb(") for _, width, height, stroke, _ in drawn)
    assert len({stroke for *_, stroke, _ in drawn}) > 5
    assert seen.chart("parallel").locator(".axis").count() == len(data["axes"]) == 9


def test_console_is_silent_and_nothing_leaves_the_page(seen: Visit) -> None:
    seen.is_silent()


def test_page_is_as_wide_as_the_window(seen: Visit) -> None:
    width, window, reach = seen.page.evaluate(
        """() => [document.documentElement.scrollWidth, window.innerWidth, Math.max(
          ...Array.from(document.querySelectorAll(".chart"), (chart) => chart.getBoundingClientRect().right))]"""
    )
    assert width == window == seen.page.viewport_size["width"]
    assert reach <= window


@pytest.fixture(scope="module")
def lines(chromium: Any, report: Path) -> Iterator[Visit]:
    """The parallel coordinates in sight, for the mouse; a test undoes what it selects."""
    found = visit(chromium, report, WIDE)
    found.chart("parallel").locator("svg").scroll_into_view_if_needed()
    yield found
    found.is_silent()
    found.page.close()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=4)
    page.mouse.up()


def middle(box: dict[str, float]) -> tuple[float, float]:
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_pointing_at_a_line_names_its_trial_and_values(lines: Visit, report: Path) -> None:
    chart, data = lines.chart("parallel"), read(report)[1].script("parallel-data")
    # Half way between the logarithmic and the next axis: there no two lines of this study cross.
    axes = [axis["name"] for axis in data["axes"]]
    left = axes.index("learning_rate")
    boxes = [middle(axis.locator(".hit").bounding_box()) for axis in chart.locator(".axis").all()[left : left + 2]]
    scale = chart.locator(".axis").nth(left).locator("line").first.bounding_box()
    for line in data["lines"]:
        place = sum(line["places"][left : left + 2]) / 2
        lines.page.mouse.move((boxes[0][0] + boxes[1][0]) / 2, scale["y"] + scale["height"] * (1 - place))
        tip = chart.locator(".tip")
        assert tip.locator("strong").inner_text().removesuffix(" ★") == line["trial"]
        assert tip.locator("dt").all_inner_texts() == axes
        assert tip.locator("dd").all_inner_texts() == [text or "inactive" for text in line["texts"]]
    lines.page.mouse.move(5, 5)
    assert chart.locator(".tip").is_hidden()


def test_a_drag_along_an_axis_selects_and_a_click_clears(lines: Visit, report: Path) -> None:
    chart, data = lines.chart("parallel"), read(report)[1].script("parallel-data")
    axis = [axis["name"] for axis in data["axes"]].index("standard_weight")
    scale = chart.locator(".axis").nth(axis).locator("line").first.bounding_box()
    x, top, height = scale["x"] + scale["width"] / 2, scale["y"], scale["height"]
    places = sorted(line["places"][axis] for line in data["lines"])
    wide = max(range(1, len(places)), key=lambda i: places[i] - places[i - 1])
    cut = (places[wide - 1] + places[wide]) / 2
    drag(lines.page, (x, top - 5), (x, top + height * (1 - cut)))
    inside = {line["trial"] for line in data["lines"] if line["places"][axis] > cut}
    assert 0 < len(inside) < len(places)
    chosen = chart.locator(".line:not(.out)").evaluate_all("(all) => all.map((line) => line.dataset.trial)")
    assert set(chosen) == inside
    assert chart.locator("output").inner_text() == f"{len(inside)} of {len(places)} trials selected"
    lines.page.mouse.click(x, top + 20)
    assert chart.locator(".line.out").count() == 0
    chart.get_by_label("only trials on the front").check()
    front = sum(line["front"] for line in data["lines"])
    assert chart.locator(".line:not(.out)").count() == front
    chart.get_by_label("only trials on the front").uncheck()


def test_lines_are_coloured_by_the_chosen_objective_and_axes_can_be_moved(lines: Visit) -> None:
    chart = lines.chart("parallel")

    def strokes() -> dict[str, str]:
        pairs = "(all) => all.map((line) => [line.dataset.trial, line.getAttribute('stroke')])"
        return dict(chart.locator(".line").evaluate_all(pairs))

    before = strokes()
    chart.get_by_label("colour by").select_option(label="bytes@int8")
    assert strokes() != before
    names = chart.locator(".name title").evaluate_all("(all) => all.map((title) => title.textContent)")
    first, second = (middle(name.bounding_box()) for name in chart.locator(".name").all()[:2])
    drag(lines.page, first, (second[0] + 40, second[1]))
    moved = chart.locator(".name title").evaluate_all("(all) => all.map((title) => title.textContent)")
    assert moved == [names[1], names[0], *names[2:]]


def test_hostile_records_stay_texts_in_the_browser(chromium: Any, tmp_path: Path) -> None:
    """Whoever can write the records can name a trial, a method or a reason; none of it becomes part of the page."""
    text = json.dumps(list(events(space(), HOSTILE, HOSTILE)))
    for word in ("t0005", "sabr"):
        text = text.replace(json.dumps(word), json.dumps(HOSTILE))
    found = visit(chromium, write_page(write_run(tmp_path / "digits", space(), json.loads(text))), WIDE)
    assert found.page.locator("img").count() == 0
    assert found.page.locator("script").count() == 4
    assert (
        found.chart("parallel")
        .locator(".line")
        .evaluate_all("(all) => all.map((line) => line.dataset.trial)")
        .count(HOSTILE)
        == 1
    )
    found.is_silent()
    found.page.close()
