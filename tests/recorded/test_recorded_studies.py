"""Every verb reads the studies of an earlier version, and says of them what it said then."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from recorded_support import CactusRay, Copied

TABLES = ("points.csv", "front.csv", "replicates.csv")


@dataclass(frozen=True)
class Study:
    """What is known of a recorded study. ``front``: trial, level, certified of 40, standard accuracy, bytes."""

    asked: int
    ended: str | None
    """How its last driver ended it; None where that was killed."""
    trials: dict[str, int]
    points: int
    front: list[tuple[str, str, int, float, int]] = field(default_factory=list)
    replicates: dict[str, int] | None = None


STUDIES = {
    "halving": Study(8, "completed", {"completed": 5, "stopped": 3}, 15, [
        ("t0004", "prune:gs-l2:0.5+int8", 24, 0.625, 1120), ("t0007", "int4", 37, 0.925, 1458),
        ("t0008", "int4", 35, 0.95, 1458),
    ]),
    "waiting": Study(6, None, {"waiting": 3}, 0),
    "replicates": Study(3, "completed", {"completed": 3}, 9, [
        ("t0002", "prune:gs-l2:0.5+int8", 22, 0.625, 1120), ("t0001", "int4", 22, 0.65, 1458),
        ("t0001", "dense", 24, 0.675, 3019),
    ], {"completed": 2}),
    "killed": Study(3, "completed", {"completed": 3}, 6, [
        ("t0003", "int8", 29, 0.9, 3813), ("t0002", "int8", 33, 0.925, 3961), ("t0001", "int8", 36, 0.975, 4004),
    ]),
    "out_of_memory": Study(
        3, "completed", {"completed": 2, "failed": 1}, 4, [("t0001", "int8", 35, 0.925, 1220)]
    ),
    "half_finished": Study(3, None, {"completed": 1, "running": 1}, 2, [("t0001", "int8", 35, 0.975, 4004)]),
    "warm": Study(1, "completed", {"completed": 1}, 3, [
        ("t0001", "prune:gs-l2:0.5+int8", 15, 0.375, 1120), ("t0001", "int4", 26, 0.775, 1458),
        ("t0001", "dense", 28, 0.825, 3019),
    ]),
}  # fmt: skip
TRIALS = {
    "halving": {"t0001": ("completed", 4, 120), "t0002": ("stopped", 1, 0), "t0003": ("stopped", 3, 0),
                "t0004": ("completed", 4, 120), "t0005": ("stopped", 1, 0), "t0006": ("completed", 4, 120),
                "t0007": ("completed", 4, 120), "t0008": ("completed", 4, 120)},
    "waiting": {"t0001": ("waiting", 1, 0), "t0002": ("waiting", 1, 0), "t0003": ("waiting", 3, 0)},
    "replicates": dict.fromkeys(("t0001", "t0002", "t0003", "t0001-s2", "t0002-s2"), ("completed", 4, 120)),
    "killed": dict.fromkeys(("t0001", "t0002", "t0003"), ("completed", 10, 80)),
    "out_of_memory": {"t0001": ("completed", 4, 80), "t0002": ("failed", 0, 0), "t0003": ("completed", 4, 80)},
    "half_finished": {"t0001": ("completed", 10, 80), "t0002": ("running", 2, 0)},
    "warm": {"t0001": ("completed", 4, 120)},
}  # fmt: skip
"""Status, epochs and verdicts of every trial."""


@pytest.fixture(params=STUDIES)
def study(request: pytest.FixtureRequest, copied: Copied) -> tuple[Path, Study]:
    """Each study as a copy, and what is known of it."""
    return copied(f"studies/{request.param}"), STUDIES[request.param]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def hypervolume(points: Sequence[tuple[float, float, float]]) -> float:
    """Volume of the union of boxes between 0 and each point, by inclusion and exclusion."""
    total = 0.0
    for count in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, count):
            a, b, c = (min(values) for values in zip(*chosen, strict=True))
            total += (-1) ** (count + 1) * a * b * c
    return total


def test_status(study: tuple[Path, Study], cactus_ray: CactusRay) -> None:
    run, known = study
    found = cactus_ray("status", run, "--json").json
    assert (found["asked"], found["trials"], found.get("replicates")) == (known.asked, known.trials, known.replicates)
    assert (found["status"] == "completed") == (known.ended == "completed")
    records = {row["trial"]: (row["status"], row["epochs"], row["verdicts"]) for row in found["records"]}
    assert records == TRIALS[run.name]
    shown = cactus_ray("status", run)
    assert shown.status == 0
    assert all(trial in shown.out for trial in records)


def test_report_makes_the_same_tables(study: tuple[Path, Study], cactus_ray: CactusRay) -> None:
    """Byte by byte. Hypervolumes of trials are those of the tables' points over the records' reference point."""
    run, known = study
    recorded = {name: (run / name).read_bytes() for name in TABLES if (run / name).exists()}
    for name in recorded:
        (run / name).unlink()
    found = cactus_ray("report", run, "--json").json
    assert (found["points"], found["trials"]) == (known.points, known.trials)
    front = [
        (p["trial"], p["level"], p["n_certified"], p["standard_accuracy"], p["bytes"])
        for p in sorted(found["front"], key=lambda p: (p["bytes"], -p["n_certified"]))
    ]
    assert front == known.front
    rebuilt = {name: (run / name).read_bytes() for name in TABLES if (run / name).exists()}
    assert {name: rebuilt[name] for name in recorded} == recorded
    assert rebuilt.keys() == recorded.keys() or run.name == "waiting"  # killed before there were any
    page = (run / "report.html").read_text()
    assert all(p["trial"] in page for p in found["front"])

    (begun,) = (event for event in events(run) if event["event"] == "study")
    limit = begun["reference_point"]["bytes"]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows_of(run / "points.csv"):
        saved = max(1.0 - float(row["bytes"]) / limit, 0.0)
        three = (float(row["certified_accuracy"]), float(row["standard_accuracy"]), saved)
        curves.setdefault(row["trial"], []).append(three)
    assert sum(map(len, curves.values())) == known.points
    metrics = {row["trial"]: row["metrics"] for row in cactus_ray("status", run, "--json").json["records"]}
    for trial, curve in curves.items():
        assert metrics[trial]["hypervolume"] == pytest.approx(hypervolume(curve), abs=1e-9)


def test_explain(study: tuple[Path, Study], cactus_ray: CactusRay) -> None:
    run, known = study
    records = cactus_ray("status", run, "--json").json["records"]
    front = Counter(row[0] for row in known.front)
    for row in records:
        found = cactus_ray("explain", run, row["trial"], "--json").json
        assert (found["status"], found["parameters"]) == (row["status"], row["parameters"])
        if "of" not in found:
            assert sum(point["on_front"] for point in found["points"]) == front[row["trial"]]
            assert all(point["on_front"] or point["dominated_by"] for point in found["points"])
    shown = cactus_ray("explain", run, "t0001")
    assert (shown.status, shown.out.startswith("t0001: ")) == (0, True)
    assert cactus_ray("explain", run, "t0404").status == 2


def test_suggest(study: tuple[Path, Study], cactus_ray: CactusRay) -> None:
    run, known = study
    found = cactus_ray("suggest", run, "--set", "learning_rate=0.0051", "--json").json
    started = sum(known.trials.values())
    assert (found["values"], found["trials_left"]) == ({"learning_rate": 0.0051}, known.asked - started)
    (*_, last) = (run / "suggestions.jsonl").read_text().splitlines()
    assert json.loads(last)["values"] == {"learning_rate": 0.0051}
    tried = next(e for e in events(run) if e["event"] == "started")["parameters"]["learning_rate"]
    assert cactus_ray("suggest", run, "--set", f"learning_rate={tried!r}").status == 2
    assert cactus_ray("suggest", run, "--set", "learning_rate=7").status == 2


@pytest.mark.parametrize("name", ["halving", "replicates", "out_of_memory"])
def test_the_same_command_finds_a_finished_study_done(name: str, cactus_ray: CactusRay, copied: Copied) -> None:
    """It prints the front, starts no Ray, and changes neither records nor tables."""
    run = copied(f"studies/{name}")
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    trust = ["--trust-code"] if name == "out_of_memory" else []
    found = cactus_ray("search", "--resume", name, "--runs", run.parent, *trust)
    assert found.status == 0, found.err
    for trial, _, _, standard, _ in STUDIES[name].front:
        assert any(trial in line and f"{standard:.1%}" in line for line in found.out.splitlines())
    assert {file: (run / file).read_bytes() for file in before} == before


# --- what one study has that others have not -----------------------------------------------------------------------


def test_a_trial_that_halving_stopped_is_explained(cactus_ray: CactusRay, copied: Copied) -> None:
    run = copied("studies/halving")
    kinds = Counter(event["event"] for event in events(run))
    assert min(kinds["rung"], kinds["waiting"], kinds["stopped"]) > 0
    found = cactus_ray("explain", run, "t0002", "--json").json
    assert found["status"] == "stopped"
    assert (found["rung"]["rank"], found["rung"]["of"], found["rung"]["went_on"]) == (2, 2, False)
    assert found["rung"]["better"]
    complete = cactus_ray("explain", run, "t0001", "--json").json
    assert complete["constraints"] == {"standard_accuracy@int4 >= 0.6": pytest.approx(-0.05)}


def test_trials_that_wait_are_explained(cactus_ray: CactusRay, copied: Copied) -> None:
    run = copied("studies/waiting")
    for trial in ("t0001", "t0002", "t0003"):
        assert cactus_ray("explain", run, trial, "--json").json["status"] == "waiting"


def test_curves_of_a_study_are_simulated(cactus_ray: CactusRay, copied: Copied) -> None:
    """Random search over all five whole trials ends at the hypervolume of the front."""
    run = copied("studies/halving")
    limit = events(run)[0]["reference_point"]["bytes"]
    front = [(n / 40, standard, 1.0 - size / limit) for _, _, n, standard, size in STUDIES["halving"].front]
    for options in ((), ("--scheduler", "none", "--sampler", "random")):
        found = cactus_ray("simulate", run, *options, "--seeds", "2", "--json").json
        assert (found["curves"], len(found["seeds"])) == (5, 2)
        for row in found["seeds"]:
            assert row["random_hypervolume"] == pytest.approx(hypervolume(front), abs=1e-9)
            assert row["hypervolume"] <= row["random_hypervolume"] + 1e-9
    assert cactus_ray("simulate", run, "--seeds", "1").status == 0


def test_the_front_was_seen_again(cactus_ray: CactusRay, copied: Copied) -> None:
    """On 20 fresh samples and with a second seed."""
    run = copied("studies/replicates")
    found = cactus_ray("explain", run, "t0001", "--json").json
    front = {point["level"]: point for point in found["points"] if point["on_front"]}
    assert set(front) == {"dense", "int4"}
    assert {(p["fresh_samples"], p["seeds"], p["over_seeds"]) for p in front.values()} == {(20, 2, "open")}
    columns = ("fresh_n_certified", "certified_accuracy_min", "certified_accuracy_max")
    assert [front["int4"][column] for column in columns] == [13, 0.55, 0.6]
    again = cactus_ray("explain", run, "t0001-s2", "--json").json
    assert (again["of"], again["replicate"], len(again["points"])) == ("t0001", 2, 3)


def test_a_study_of_two_drivers(cactus_ray: CactusRay, copied: Copied) -> None:
    """Its trainer was killed once, its driver once; whatever was verified before was not verified again."""
    run = copied("studies/killed")
    found = events(run)
    assert [event["event"] for event in found].count("driver") == 2
    (died,) = (event for event in found if event["event"] == "died")
    assert died["trial"] == "t0001"
    chunks = Counter(event["chunk"] for event in found if event["event"] == "verdicts")
    assert set(chunks.values()) == {1}
    assert any(event["stage"] == "dear" for event in found if event["event"] == "verdicts")
    status = cactus_ray("status", run, "--json").json
    assert status["verifier_seconds"]["branch"] > 0


def test_a_lack_of_gpu_memory_and_a_loss_that_is_not_finite(cactus_ray: CactusRay, copied: Copied) -> None:
    run = copied("studies/out_of_memory")
    assert any(event["event"] == "oom" for event in events(run))
    found = cactus_ray("status", run, "--json").json
    assert found["packing"]["trials_per_gpu"] == 2
    failed = cactus_ray("explain", run, "t0002", "--json").json
    assert failed["status"] == "failed"
    assert "not finite" in failed["reason"]


def test_trials_that_a_study_was_told_are_none_of_its_own(cactus_ray: CactusRay, copied: Copied) -> None:
    run = copied("studies/warm")
    (past,) = (event for event in events(run) if event["event"] == "past")
    assert len(past["trials"]) + len(past["skipped"]) == 5
    assert cactus_ray("status", run, "--json").json["trials"] == {"completed": 1}


def test_a_trial_of_a_study_is_trained_again(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    run = copied("studies/halving")
    network = tmp_path / "again.safetensors"
    assert cactus_ray("train", "--trial", run / "t0004", "--out", network).status == 0
    found = cactus_ray("verify", network, "--levels", "dense", "--samples", "10", "--bound", "ibp", "--json")
    assert found.status == 0


def test_a_network_of_a_study_is_verified(cactus_ray: CactusRay, copied: Copied) -> None:
    """The checkpoint of a front point, on the samples by which it was chosen: the verdicts are on record."""
    network = copied("studies/halving/checkpoints/t0007.safetensors")
    asked = ["verify", network, "--levels", "int4", "--split", "selection", "--samples", "40", "--bound", "crown"]
    (row,) = cactus_ray(*asked, "--json").json
    assert (row["n_certified"], row["standard_accuracy"]) == (37, 0.925)
