"""The page: what it shows, in every state of a run, and that it can neither be injected into nor ask for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from studies import events, small_space, write_run

import cactus_ray.report
from cactus_ray.report.page import script_json, write_page
from cactus_ray.search.store import read_records

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \"'&{{ 7*7 }}\u2028"


class Elements(HTMLParser):
    """Start tags with their attributes, and the texts of scripts, styles and table rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def script(self, identifier: str) -> Any:
        scripts = [text for tag, text in self.texts if tag == "script"]
        number = [a.get("id") for a in self.named("script")].index(identifier)
        return json.loads(scripts[number])


def read(path: Path) -> tuple[str, Elements]:
    text = path.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    return text, elements


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = small_space()
    run = write_run(tmp_path_factory.mktemp("run") / "digits", space, events(space, HOSTILE, HOSTILE))
    write_page(run)
    return run


def test_page_asks_for_nothing(finished: Path) -> None:
    text, elements = read(finished / "report.html")
    for tag, attributes in elements.tags:
        for key in ("src", "href", "srcset", "data", "action", "poster"):
            assert not (attributes.get(key) or "").startswith(("http:", "https:", "//")), (tag, attributes)
    assert not elements.named("img")
    own = text.replace(get_plotlyjs(), "")
    assert "@import" not in own
    assert not re.search(r"url\(\s*['\"]?(https?:|//)", text)
    policy = next(attributes["content"] or "" for attributes in elements.named("meta") if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "showSendToCloud: false" in own


def test_plotly_is_inside_exactly_once(finished: Path) -> None:
    assert read(finished / "report.html")[0].count(get_plotlyjs()) == 1


def test_hostile_texts_stay_texts(finished: Path) -> None:
    text, elements = read(finished / "report.html")
    assert "<script>alert" not in text
    assert "{{" not in text.replace(get_plotlyjs(), "").replace("{{ 7*7 }}", "")  # the template engine did not run it
    assert len(elements.named("script")) == 4
    assert any(HOSTILE in data for tag, data in elements.texts if tag == "td")


def test_script_json_survives_any_text() -> None:
    value = {"name": "</script><!--<script>\u2028&"}
    text = str(script_json(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_figures_are_drawn_into_places_that_exist(finished: Path) -> None:
    _, elements = read(finished / "report.html")
    figures = elements.script("figures")
    places = {attributes.get("id") for attributes in elements.named("div")}
    assert set(figures) <= places
    assert {"front", "curves", "importances", "cost", "training-loss"} <= set(figures)
    assert "parallel" in places
    assert "bdata" not in json.dumps(figures)


def test_front_figure_shows_every_point_with_its_interval(finished: Path) -> None:
    figure = read(finished / "report.html")[1].script("figures")["front"]
    marks = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["x"]) for trace in marks) == len(read_records(finished).points()) == 12
    assert all(bar == pytest.approx(0.03) for trace in marks for bar in trace["error_y"]["array"])
    (line,) = (trace for trace in figure["data"] if trace["mode"] == "lines")
    assert line["y"] == sorted(line["y"])
    assert figure["layout"]["xaxis"]["type"] == "log"


def test_failed_and_stopped_trials_are_listed_and_never_on_the_front(finished: Path) -> None:
    text, elements = read(finished / "report.html")
    points = text[text.index('id="points"') : text.index("</table>", text.index('id="points"'))]
    losses = text[text.index('id="losses"') : text.index("</table>", text.index('id="losses"'))]
    for trial in ("t0002", "t0003"):
        assert trial in losses
        assert trial not in points
        assert trial not in json.dumps(elements.script("figures")["front"])
    assert "t0004" in points
    assert "t0004" not in losses


def test_every_trial_that_cost_anything_is_in_the_ledger(finished: Path) -> None:
    text, _ = read(finished / "report.html")
    table = text[text.index('id="ledger"') : text.index("</table>", text.index('id="ledger"'))]
    for heading in ("training s", "attack s", "overhead s", "CPU s"):
        assert f">{heading}<" in table
    assert table.count("<tr>") == 1 + len(read_records(finished).trials)


def test_commands_name_trial_and_level(finished: Path) -> None:
    pres = " ".join(data for tag, data in read(finished / "report.html")[1].texts if tag == "pre")
    assert (
        f"cactus-ray pick {finished} --trial t0006 --level prune:gu-l1:0.9 --out picked/t0006-prune-gu-l1-0.9" in pres
    )
    assert re.search(r"pick \S+ --max-bytes \d+k --min-certified 0\.\d+ --min-accuracy 0\.95 --prefer certified", pres)


@pytest.mark.parametrize("length", [1, 2, 4, 12])
def test_page_of_a_run_that_died(tmp_path: Path, length: int) -> None:
    """After the study event alone, after a start, after epochs, and with the second trial half trained."""
    space = small_space()
    run = write_run(tmp_path / "run", space, list(events(space))[:length])
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"event":"epoch","trial":"t00')
    text, elements = read(write_page(run))
    assert "running, or ended without a last word" in text
    assert "1 lines of trials.jsonl" in text
    assert ("front" in elements.script("figures")) == (length == 12)
    assert "Too few trials to say" in text


def test_page_without_a_reference_point(tmp_path: Path) -> None:
    space = small_space()
    lines = [event for event in events(space) if event["event"] != "study"]
    assert "no reference" in read(write_page(write_run(tmp_path / "run", space, lines)))[0]


def test_all_trials_failed(tmp_path: Path) -> None:
    space = small_space(trials=2)
    lines = list(takewhile(lambda e: e["event"] != "completed", events(space)))
    assert not any(e["event"] == "completed" for e in lines)
    text, elements = read(write_page(write_run(tmp_path / "run", space, lines)))
    assert "No trial is complete yet" in text
    assert "front" not in elements.script("figures")


def test_table_is_sortable_by_keyboard(finished: Path) -> None:
    text, _ = read(finished / "report.html")
    head = text[text.index('id="points"') : text.index("</thead>", text.index('id="points"'))]
    assert head.count("<button") == head.count('scope="col"') >= 10
    assert 'id="front-only"' in text
    assert "makeSortable" in text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_sort_order_under_node() -> None:
    script = Path(cactus_ray.report.__file__).with_name("page.js")
    cases = {
        "numbers": ["10", "9", "-1", "1e3", "0.5"],
        "texts": ["t10", "t9", "int8", "prune:gu-l1:0.95", "prune:gu-l1:0.9"],
        "empty": ["2", "", "1"],
    }
    program = f"""
        const {{ sortedOrder }} = require({json.dumps(str(script))});
        const cases = {json.dumps(cases)};
        const sorted = (values, down) => sortedOrder(values, down).map((i) => values[i]);
        console.log(JSON.stringify(Object.fromEntries(Object.entries(cases).map(
            ([name, values]) => [name, [sorted(values, false), sorted(values, true)]]))));
    """
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found["numbers"] == [["-1", "0.5", "9", "10", "1e3"], ["1e3", "10", "9", "0.5", "-1"]]
    assert found["texts"][0] == ["int8", "prune:gu-l1:0.9", "prune:gu-l1:0.95", "t9", "t10"]
    assert found["empty"] == [["1", "2", ""], ["2", "1", ""]]
