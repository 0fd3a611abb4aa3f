"""Why a trial is where it is, and which networks are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from course import SPACE, begin, result, started

from cactus_ray.errors import UserError
from cactus_ray.search.checkpoints import prune_checkpoints
from cactus_ray.search.explain import explain
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study

MEASURES = {"bytes": 1500, "ideal_bits": 8000, "macs": 500}


@pytest.fixture
def space() -> Space:
    constraints = [{"metric": "certified_accuracy@int8", "min": 0.5}]
    return parse_space({**SPACE, "constraints": constraints, "search": {"trials": 9}}, "course.yaml")


def complete(study: Study, verdict: str, **more: Any) -> str:
    trial = started(study).id
    networks = {"last": trial.encode(), "best": b"best " + trial.encode()}
    for chunk in study.trained(trial, networks, "last", 1, 2.0):
        study.verified(result(chunk, verdict, **more))
    return trial


def test_a_dominated_trial_names_its_rivals_and_by_how_much(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    good, bad = complete(study, "CERTIFIED"), complete(study, "FALSIFIED", measures=MEASURES)
    found = explain(space, read_records(tmp_path), bad)
    assert found["constraints"] == {"certified_accuracy@int8 >= 0.5": pytest.approx(0.5)}
    point = found["points"][0]
    assert not point["on_front"]
    assert point["dominated_by"][0] == {
        "trial": good, "level": "dense", "gains": {"certified_accuracy": 1.0, "bytes": -500},
    }  # fmt: skip
    best = explain(space, read_records(tmp_path), good)
    assert best["constraints"] == {"certified_accuracy@int8 >= 0.5": pytest.approx(-0.5)}
    assert [p["on_front"] for p in best["points"]] == [True, True]
    assert best["points"][0]["dominated_by"] == []


def test_trials_that_did_not_complete_say_why(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    names = [started(study).id for _ in range(4)]
    study.epoch(names[0], 1, 30, {"loss": 2.0})
    study.failed(names[0], "the loss is not finite at step 7", 7)
    study.stopped(names[1], "dominated at rung 3")
    study.trained(names[3], {"last": b"network"}, "last", 1, 2.0)
    records = read_records(tmp_path)
    reasons = [explain(space, records, name)["reason"] for name in names]
    assert reasons[:2] == [
        "failed after 1 epochs: the loss is not finite at step 7", "stopped after 0 epochs: dominated at rung 3",
    ]  # fmt: skip
    assert reasons[2].startswith("training: 0 epochs")
    assert reasons[3].startswith("trained, verification is not complete (0 verdicts")
    with pytest.raises(UserError, match="TRIAL: got 't0099'; expected a trial of this run: t0001, t0002"):
        explain(space, records, "t0099")


def at_rung(tmp_path: Path, promote: bool) -> tuple[Space, list[str]]:
    """Five trials at the rung of one epoch, all in one front; the fourth is ahead, the last lacks values."""
    search = {"trials": 9, "sampler": "random", "scheduler": {"name": "asha", "promote": promote}}
    space = parse_space({**SPACE, "train": {"epochs": 30}, "search": search}, "course.yaml")
    study = begin(space, tmp_path)
    names = []
    for quality in (0.5, 0.4, 0.3, 0.9, None):
        while (start := started(study)).id in names:
            pass  # promoted, and trains on
        names.append(start.id)
        metrics = dict.fromkeys(study.rungs.halving.rules.goals, quality)
        metrics["ibp_certified_accuracy@dense"] = None if quality is None else 0.7 - quality
        if not study.epoch(start.id, 1, 30, metrics):
            study.waits(start.id, 1, seconds=1.0)
    return space, names


def test_a_stopped_trial_names_what_was_compared_and_who_stood_better_then(tmp_path: Path) -> None:
    space, names = at_rung(tmp_path, promote=False)
    records = read_records(tmp_path)
    found = explain(space, records, names[2])
    assert found["status"] == "stopped"
    rung = found["rung"]
    assert (rung["rung"], rung["rank"], rung["of"], rung["front"], rung["went_on"]) == (1.0, 3, 3, 0, False)
    assert rung["goals"] == dict.fromkeys(rung["values"], "maximize")
    assert rung["values"]["standard_accuracy@int8"] == 0.3
    assert rung["values"]["ibp_certified_accuracy@dense"] == pytest.approx(0.4)
    assert [(b["trial"], b["rank"], b["front"], b["dominates"]) for b in rung["better"]] == [
        (names[0], 1, 0, False), (names[1], 2, 0, False),
    ]  # fmt: skip
    assert rung["better"][0]["values"]["standard_accuracy@int8"] == 0.5
    assert "now" not in rung
    lacking = explain(space, records, names[4])["rung"]
    assert (lacking["front"], lacking["values"]["standard_accuracy@dense"], len(lacking["better"])) == (None, None, 4)


def test_a_waiting_trial_is_compared_with_all_that_came_by_now(tmp_path: Path) -> None:
    space, names = at_rung(tmp_path, promote=True)
    records = read_records(tmp_path)
    found = explain(space, records, names[2])
    assert found["status"] == "waiting"
    rung = found["rung"]
    assert (rung["rank"], rung["of"]) == (3, 3)
    assert rung["now"] == {"rank": 4, "front": 0, "of": 5}
    assert [b["trial"] for b in rung["better"]] == [names[3], names[0], names[1]]
    assert explain(space, records, names[3])["rung"]["better"] == []


def test_those_that_dominate_a_trial_are_named_first(tmp_path: Path) -> None:
    search = {"trials": 9, "sampler": "random", "scheduler": {"name": "asha", "promote": False}}
    space = parse_space({**SPACE, "train": {"epochs": 30}, "search": search}, "course.yaml")
    study = begin(space, tmp_path)
    names = []
    for other, quality in ((0.9, 0.1), (0.5, 0.5), (0.4, 0.4)):
        names.append(started(study).id)
        goals = study.rungs.halving.rules.goals
        metrics = {goal: other if goal.startswith("standard") else quality for goal in goals}
        study.epoch(names[-1], 1, 30, metrics)
    rung = explain(space, read_records(tmp_path), names[2])["rung"]
    assert (rung["front"], rung["rank"]) == (1, 3)
    assert [(b["trial"], b["dominates"]) for b in rung["better"]] == [(names[1], True), (names[0], False)]


def test_only_networks_that_can_matter_are_kept(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    bad = complete(study, "FALSIFIED", measures=MEASURES)
    assert prune_checkpoints(tmp_path, read_records(tmp_path), space.front) == []  # it is on the front as yet
    good, open_ = complete(study, "CERTIFIED"), started(study).id
    study.trained(open_, {"last": b"network"}, "last", 1, 2.0)
    broken = started(study).id
    study.trained(broken, {"last": b"network"}, "last", 1, 2.0)
    study.failed(broken, "level int8: overflow")
    assert prune_checkpoints(tmp_path, read_records(tmp_path), space.front) == [bad, broken]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {f"{good}.safetensors", f"{good}.best.safetensors", f"{open_}.safetensors"}
    assert prune_checkpoints(tmp_path, read_records(tmp_path), space.front) == []
    again = Study(space, study.store, read_records(tmp_path), [0, 1, 2])
    assert {chunk.trial for chunk in again.resume()} == {open_}
