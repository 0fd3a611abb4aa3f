"""Tables and kept networks that follow a study are those that its records give."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from course import SPACE, begin, result, started

from cactus_ray.search import upkeep as module
from cactus_ray.search.checkpoints import prune_checkpoints
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records, write_tables
from cactus_ray.search.study import Study
from cactus_ray.search.upkeep import Upkeep

TABLES = ("points.csv", "front.csv")


def space(**search: Any) -> Space:
    constraints = [{"metric": "certified_accuracy@int8", "min": 0.5}]
    return parse_space({**SPACE, "constraints": constraints, "search": {"trials": 40, **search}}, "course.yaml")


def followed(asked: Space, run: Path) -> tuple[Study, Upkeep]:
    study = begin(asked, run)
    upkeep = Upkeep(asked, study.store, Records())
    study.listeners.append(upkeep.event)
    return study, upkeep


def work(study: Study, trials: int, draw: random.Random) -> None:
    """Trials that end in every way, in another order than they start."""
    names = [started(study).id for _ in range(trials)]
    draw.shuffle(names)
    for name in names:
        if draw.random() < 0.15:
            study.failed(name, "out of memory")
            continue
        chunks = study.trained(name, {"last": name.encode(), "best": b"best " + name.encode()}, "last", 1, 2.0)
        if draw.random() < 0.15:
            study.stopped(name, "by hand")
            continue
        size = draw.randint(1, 5) * 300
        for chunk in chunks:
            measures = {"bytes": size, "ideal_bits": 8 * size, "macs": 500}
            study.verified(result(chunk, draw.choice(["CERTIFIED", "FALSIFIED", "UNKNOWN"]), measures=measures))


def texts(run: Path) -> list[str]:
    return [(run / name).read_text() for name in TABLES]


def networks(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("seed", range(4))
def test_tables_and_networks_are_those_of_the_records(seed: int, tmp_path: Path) -> None:
    asked = space()
    study, upkeep = followed(asked, tmp_path)
    draw = random.Random(seed)
    for _ in range(3):
        work(study, 8, draw)
        upkeep.write()
        found, left = texts(tmp_path), networks(tmp_path)
        records = read_records(tmp_path)
        write_tables(tmp_path, records, asked.front)
        assert texts(tmp_path) == found
        assert prune_checkpoints(tmp_path, records, asked.front, asked.constraints) == []
        assert networks(tmp_path) == left
    again = Upkeep(asked, study.store, read_records(tmp_path, verdicts=False))
    again.write()
    assert texts(tmp_path) == found


def test_all_networks_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    study, _ = followed(space(keep="all"), tmp_path)
    work(study, 12, random.Random(0))
    trained = [t for t in read_records(tmp_path).trials.values() if t.checkpoint]
    assert len(networks(tmp_path)) == 2 * len(trained)


def test_what_a_killed_driver_left_is_cleared_up(tmp_path: Path) -> None:
    study = begin(space(), tmp_path)
    work(study, 12, random.Random(1))
    before = networks(tmp_path)
    Upkeep(space(), RunStore(tmp_path), read_records(tmp_path, verdicts=False))
    assert networks(tmp_path) < before


def test_tables_are_whole_while_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written without being asked for, so a killed driver leaves some; a column nobody knew is taken in."""
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.0)
    asked = space()
    study, upkeep = followed(asked, tmp_path)
    written, write = threading.Event(), upkeep.write

    def noted() -> None:
        write()
        written.set()

    monkeypatch.setattr(upkeep, "write", noted)
    with upkeep.writing():
        work(study, 6, random.Random(2))
        assert written.wait(60)
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert lines[0].startswith("trial,level,")
    assert all(line.count(",") == lines[0].count(",") for line in lines)
    point = {**upkeep.table.front.points[0], "trial": "t0001", "level": 'odd, "level"', "extra": 0.1}
    upkeep.event({"event": "completed", "trial": "t0001", "points": [point], "metrics": {}})
    write()
    found = texts(tmp_path)
    records = read_records(tmp_path)
    records.trials["t0001"].status, records.trials["t0001"].points = "completed", [point]
    write_tables(tmp_path, records, asked.front)
    assert texts(tmp_path) == found


def test_records_without_the_verdicts_of_ended_trials_know_all_else(tmp_path: Path) -> None:
    asked = space()
    study = begin(asked, tmp_path)
    work(study, 10, random.Random(3))
    waiting = started(study).id
    chunks = study.trained(waiting, {"last": b"network"}, "last", 1, 2.0)
    study.verified(result(chunks[0]))
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"event":"verdicts","trial":"t0001","levels":{},"ledger":{"ibp":1')
    whole, thin = read_records(tmp_path), read_records(tmp_path, verdicts=False)
    assert thin.damaged_lines == whole.damaged_lines == 1
    assert thin.ledger() == whole.ledger()
    assert thin.trials[waiting] == whole.trials[waiting]
    assert thin.trials[waiting].verdicts
    for name, trial in whole.trials.items():
        if name != waiting:
            assert thin.trials[name].verdicts == {}
            for key in ("status", "points", "metrics", "ledger", "epochs", "error", "sha256", "train_seconds"):
                assert getattr(thin.trials[name], key) == getattr(trial, key)
    assert thin.drivers == whole.drivers
