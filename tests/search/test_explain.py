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
