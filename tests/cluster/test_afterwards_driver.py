"""Replicates and fresh samples on a small real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import REFERENCE, SPACE, space

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.config import RunConfig, parse
from cactus_ray.search.replicates import leading, replicate_seed
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


def test_a_study_trains_its_front_again_and_sees_it_on_fresh_samples(tmp_path: Path) -> None:
    short = {**SPACE["train"], "epochs": 1}
    tiny = space(train=short, search={"trials": 2, "sampler": "random", "seeds": 2})
    fresh = list(range(40, 60))
    study = Study(tiny, RunStore(tmp_path), Records(), list(range(40)), fresh=fresh)
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=4))
    records = read_records(tmp_path)
    assert records.finished is not None
    assert records.finished["status"] == "completed"
    ahead = leading(records.points(), tiny.front)
    members = {trial for trial, _ in ahead}
    assert [t.status for t in records.drawn()] == ["completed"] * 2
    assert {t.of for t in records.replicates()} == members
    for replicate in records.replicates():
        assert replicate.status == "completed", replicate.error
        original = records.trials[str(replicate.of)]
        assert parse(RunConfig, replicate.config).seed == replicate_seed(original.seed, 2)
        assert replicate.sha256 != original.sha256
        assert (replicate.started or 0) >= max(t.ended or 0 for t in records.drawn())
    for trial, level in ahead:
        again = records.trials[trial].again
        assert again is not None
        (point,) = (p for p in again.points if p["level"] == level)
        assert (point["split"], point["samples"]) == ("selection-fresh", 20)
        assert set(again.verdicts[level]) == set(fresh)
        assert set(records.trials[trial].verdicts[level]) == set(range(40))
    assert {p["trial"] for p in records.points()} == {"t0001", "t0002"}
    assert Study(tiny, RunStore(tmp_path), records, list(range(40)), fresh=fresh).done
