"""A new study is told the trials of recorded studies and of recorded Optuna storages.

A limit of hours that is over at once ends the study after the warm start, before any trial and before a Ray starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recorded_support import CactusRay, Copied


def told(
    cactus_ray: CactusRay, source: Path | str, space: dict[str, Any], tmp_path: Path, *options: str
) -> dict[str, Any]:
    """What a new study records of a source."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "new.yaml"
    file.write_text(yaml.safe_dump({**space, "name": "new"}))
    runs = tmp_path / "runs"
    asked = ["search", file, "--runs", runs, "--from", source, *options, "--max-hours", "1e-12", "--json"]
    found = cactus_ray(*asked)
    assert found.status == 1, found.err  # there are no points
    events = [json.loads(line) for line in (runs / "new" / "trials.jsonl").read_text().splitlines()]
    assert not any(event["event"] == "started" for event in events)
    (past,) = (event for event in events if event["event"] == "past")
    return dict(past)


def space_of(run: Path, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((run / "space.yaml").read_text()), **changes}


@pytest.mark.parametrize(("study", "trials"), [
    ("halving", ["t0001", "t0004", "t0006", "t0007", "t0008"]),
    ("replicates", ["t0001", "t0002", "t0003"]),  # no replicate
    ("killed", ["t0001", "t0002", "t0003"]),
    ("half_finished", ["t0001"]),
    ("warm", ["t0001"]),  # and not what it was told itself
])  # fmt: skip
def test_completed_trials_of_a_study_are_told(
    study: str, trials: list[str], cactus_ray: CactusRay, copied: Copied, tmp_path: Path
) -> None:
    run = copied(f"studies/{study}")
    objectives = ["hypervolume", "mean_certified_accuracy"]  # both are worked out again from the points
    space = space_of(run, objectives=[{"metric": name, "goal": "maximize"} for name in objectives])
    past = told(cactus_ray, run, space, tmp_path)
    assert [row["trial"] for row in past["trials"]] == trials
    assert (past["skipped"], past["notes"]) == ([], [])
    records = {row["trial"]: row for row in cactus_ray("status", run, "--json").json["records"]}
    for row in past["trials"]:
        recorded = records[row["trial"]]
        assert row["parameters"] == recorded["parameters"]
        assert row["objectives"] == pytest.approx([recorded["metrics"][name] for name in objectives], abs=1e-9)


def test_what_does_not_fit_is_named(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    run = copied("studies/halving")
    space = space_of(run, verification={"samples": 40, "attack_steps": 5, "bound": "ibp"})
    space["parameters"]["learning_rate"]["max"] = 0.01
    past = told(cactus_ray, run, space, tmp_path)
    assert [row["trial"] for row in past["trials"]] == ["t0001", "t0004", "t0006"]
    assert [row["trial"] for row in past["skipped"]] == ["t0007", "t0008"]
    assert all("learning_rate" in row["why"] for row in past["skipped"])
    (note,) = past["notes"]
    assert "crown there and ibp here" in note


def test_a_study_without_a_completed_trial_is_refused(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    run = copied("studies/waiting")
    file = tmp_path / "new.yaml"
    file.write_text(yaml.safe_dump(space_of(run, name="new")))
    found = cactus_ray("search", file, "--runs", tmp_path / "runs", "--from", run)
    assert found.status == 2
    assert str(run) in found.err
    assert not (tmp_path / "runs" / "new" / "trials.jsonl").exists()


def test_the_journal_of_a_study_says_what_the_study_says(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    run, journal = copied("studies/halving"), copied("optuna/halving.journal")
    past = told(cactus_ray, journal, space_of(run), tmp_path / "of_journal")
    expected = told(cactus_ray, run, space_of(run), tmp_path / "of_run")
    keys = ("parameters", "objectives", "violations")
    assert [[row[key] for key in keys] for row in past["trials"]] == [
        [row[key] for key in keys] for row in expected["trials"]
    ]
    assert len(past["trials"]) == 5
    assert past["skipped"] == []


@pytest.mark.parametrize(("url", "options"), [("", ()), ("sqlite:///", ("--from-study", "own"))])
def test_a_study_of_optuna_in_sqlite(
    url: str, options: tuple[str, ...], cactus_ray: CactusRay, copied: Copied, tmp_path: Path
) -> None:
    file = copied("optuna/own.db")
    space = space_of(copied("studies/halving"), constraints=[])
    space["parameters"] = {"method": {"values": ["ibp", "sabr"]}, "learning_rate": {"min": 0.002, "max": 0.02}}
    past = told(cactus_ray, f"{url}{file}", space, tmp_path, *options)
    assert [(row["parameters"], row["objectives"]) for row in past["trials"]] == [
        ({"method": "ibp", "learning_rate": 0.004}, [0.5, 0.7]),
        ({"method": "ibp", "learning_rate": 0.015}, [0.6, 0.8]),
    ]
    (skipped,) = past["skipped"]  # the failed one is not even that
    assert skipped["trial"] == "trial 2"
    assert "0.05" in skipped["why"]
