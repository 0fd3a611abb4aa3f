"""Records survive whatever ends a driver, and nothing that is not whole and finite becomes a point."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cactus_ray.errors import UserError
from cactus_ray.search.store import COLUMNS, Records, RunStore, read_records, write_tables

FRONT = {"certified_accuracy": "maximize", "bytes": "minimize"}


def point(
    trial: str = "t0001", level: str = "dense", certified: int = 80, size: int = 1000, **more: Any
) -> dict[str, Any]:
    return {
        "trial": trial, "level": level, "method": "cactus", "seed": 1, "split": "selection", "samples": 100,
        "standard_accuracy": 0.9, "n_certified": certified, "n_falsified": 90 - certified, "n_unknown": 10,
        "certified_accuracy": certified / 100, "bytes": size, "ideal_bits": 8 * size, "macs": 7, "train_seconds": 1.5,
        "verify_seconds": 0.1 + 0.2, "config_hash": "00ff", **more,
    }  # fmt: skip


def started(number: int, **more: Any) -> dict[str, Any]:
    known = {"parameters": {"learning_rate": 0.1}, "config": {}, "config_hash": "00ff", "seed": 1, "time": 1.0}
    return {"event": "started", "trial": f"t{number:04d}", "number": number, **known, **more}


def completed(number: int, *points: dict[str, Any]) -> dict[str, Any]:
    trial = f"t{number:04d}"
    return {
        "event": "completed",
        "trial": trial,
        "points": [*(points or [point(trial)])],
        "metrics": {"a": 1.0},
        "time": 2.0,
    }


def verdicts(trial: str, indices: list[int], verdict: str = "CERTIFIED") -> dict[str, Any]:
    rows = [[i, 3, verdict, True, 0.5, "ibp", 0.01] for i in indices]
    return {"event": "verdicts", "trial": trial, "level": "dense", "split": "selection", "chunk": "c", "samples": rows}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    found = RunStore(tmp_path / "run")
    found.append({"event": "study", "schema": 1, "name": "x", "reference_point": {"bytes": 5.0}})
    return found


def test_a_trial_is_read_back_as_it_went(store: RunStore) -> None:
    store.append(started(1))
    for epoch in (1, 2, 2):  # an epoch that was trained again after a resume counts once
        store.append(
            {"event": "epoch", "trial": "t0001", "epoch": epoch, "epochs": 2, "metrics": {"loss": 1.0 / epoch}}
        )
    assert read_records(store.path).trials["t0001"].status == "running"
    store.append(
        {"event": "trained", "trial": "t0001", "epochs": 2, "train_seconds": 3.5, "checkpoint": "c", "sha256": "d"}
    )
    store.append(verdicts("t0001", [0, 1]))
    store.append(verdicts("t0001", [1, 2]))  # delivered twice
    assert read_records(store.path).trials["t0001"].status == "trained"
    store.append(completed(1))
    store.append({"event": "finished", "status": "completed", "seconds": 9.0})
    records = read_records(store.path)
    trial = records.trials["t0001"]
    assert (trial.status, trial.number, trial.parameters) == ("completed", 1, {"learning_rate": 0.1})
    assert [e["epoch"] for e in trial.epochs] == [1, 2]
    assert (trial.train_seconds, trial.checkpoint, sorted(trial.verdicts["dense"])) == (3.5, "c", [0, 1, 2])
    assert records.points() == [point()]
    assert (records.study["reference_point"], records.damaged_lines) == ({"bytes": 5.0}, 0)
    assert records.finished is not None
    assert records.finished["status"] == "completed"


def staged(stage: str, indices: list[int], verdict: str, by: str, **more: Any) -> dict[str, Any]:
    rows = [[i, 3, verdict, True, 0.5, by, 0.01] for i in indices]
    levels = {level: {"samples": rows, "measures": {"bytes": 5}, "seconds": 0.5} for level in ("dense", "int8")}
    chunk = f"t0001/{stage}/{indices[0]}"
    return {"event": "verdicts", "trial": "t0001", "chunk": chunk, "stage": stage, "levels": levels, **more}


def test_stages_losses_and_the_ledger_are_read_back(store: RunStore) -> None:
    store.append(started(1))
    store.append(staged("cheap", [0, 1], "UNKNOWN", "bounds", ledger={"attack": 0.75, "ibp": 0.25}))
    store.append({"event": "lost", "trial": "t0001", "chunk": "c", "reason": "verifier_died", "seconds": 2.0})
    store.append({"event": "lost", "trial": "t0001", "chunk": "c", "reason": "verifier_hung", "seconds": 3.0})
    store.append(staged("dear", [1], "CERTIFIED", "branch", ledger={"branch": 1.0}))
    records = read_records(store.path)
    trial = records.trials["t0001"]
    assert {level: [row[2] for row in rows.values()] for level, rows in trial.verdicts.items()} == {
        "dense": ["UNKNOWN", "CERTIFIED"], "int8": ["UNKNOWN", "CERTIFIED"],
    }  # fmt: skip
    assert (trial.dear, trial.losses) == ({"dense": {1}, "int8": {1}}, {"c": 2})
    assert (trial.measures["int8"], trial.verify_seconds) == ({"bytes": 5}, {"dense": 1.0, "int8": 1.0})
    assert records.ledger() == {"attack": 0.75, "ibp": 0.25, "lost": 5.0, "branch": 1.0}


def test_verdicts_of_one_level_as_they_were_once_written_are_the_last_word(store: RunStore) -> None:
    store.append(started(1))
    store.append({**verdicts("t0001", [0, 1], "UNKNOWN"), "measures": {"bytes": 5}, "seconds": 0.5})
    trial = read_records(store.path).trials["t0001"]
    assert trial.dear == {"dense": {0, 1}}
    assert (trial.measures, trial.verify_seconds) == ({"dense": {"bytes": 5}}, {"dense": 0.5})
    assert trial.ledger == {"verification": 0.5}


@pytest.mark.parametrize("levels", [None, [], {"dense": 3}, {"dense": {"samples": 4}}])
def test_verdicts_that_make_no_sense_are_damage(store: RunStore, levels: Any) -> None:
    store.append(started(1))
    store.append({"event": "verdicts", "trial": "t0001", "stage": "cheap", "levels": levels})
    records = read_records(store.path)
    assert (records.damaged_lines, records.trials["t0001"].verdicts) == (1, {})


def test_verdicts_of_a_network_that_was_trained_anew_are_dropped(store: RunStore) -> None:
    store.append(started(1))
    trained = {"event": "trained", "trial": "t0001", "epochs": 2, "train_seconds": 3.5, "checkpoint": "c"}
    store.append({**trained, "sha256": "one"})
    store.append(verdicts("t0001", [0]))
    store.append({**trained, "sha256": "one"})
    assert read_records(store.path).trials["t0001"].verdicts
    store.append({**trained, "sha256": "two"})
    assert not read_records(store.path).trials["t0001"].verdicts


def test_a_run_that_goes_on_is_not_finished(store: RunStore) -> None:
    store.append({"event": "finished", "status": "interrupted", "seconds": 1.0})
    assert read_records(store.path).finished is not None
    store.append(started(1))
    assert read_records(store.path).finished is None


@pytest.mark.parametrize("kind", ["failed", "stopped"])
def test_a_trial_that_failed_or_stopped_never_has_points(store: RunStore, kind: str) -> None:
    store.append(started(1))
    store.append(completed(1))
    store.append(started(2))
    store.append({"event": kind, "trial": "t0002", "error": "loss is nan", "step": 3})
    store.append(started(3))
    store.append(completed(3, point("t0003", certified=90, size=1)))
    store.append({"event": kind, "trial": "t0003", "error": "late", "step": None})
    records = read_records(store.path)
    assert [t.status for t in records.trials.values()] == ["completed", kind, kind]
    assert records.trials["t0002"].error == "loss is nan"
    write_tables(store.path, records, FRONT)
    assert set(pd.read_csv(store.path / "points.csv").trial) == {"t0001"}
    assert set(pd.read_csv(store.path / "front.csv").trial) == {"t0001"}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"certified_accuracy": math.nan},
        {"bytes": math.inf},
        {"bytes": 10.5},
        {"bytes": -1},
        {"standard_accuracy": 1.5},
        {"standard_accuracy": None},
        {"n_certified": 81},
        {"certified_accuracy": 0.81},
        {"train_seconds": None},
        {"trial": "t0009"},
        {"level": 8},
        {"latency": math.nan},
        {"samples": 0, "n_certified": 0, "n_falsified": 0, "n_unknown": 0},
    ],
)
def test_a_wrong_point_is_refused_and_nothing_is_written(store: RunStore, change: dict[str, Any]) -> None:
    store.append(started(1))
    before = store.file.read_bytes()
    with pytest.raises(ValueError, match="refused"):
        store.append(completed(1, point(**change)))
    assert store.file.read_bytes() == before


@pytest.mark.parametrize("column", [c for c in COLUMNS if c != "on_front"])
def test_a_point_needs_every_column(store: RunStore, column: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        store.append(completed(1, {k: v for k, v in point().items() if k != column}))


def test_records_that_are_not_whole_are_refused(store: RunStore) -> None:
    with pytest.raises(ValueError, match="metric a is nan"):
        store.append({**completed(1), "metrics": {"a": math.nan}})
    with pytest.raises(ValueError, match="no points or no metrics"):
        store.append({**completed(1), "points": []})
    with pytest.raises(ValueError, match="a level twice"):
        store.append(completed(1, point(), point()))
    with pytest.raises(ValueError, match="'epochs'; expected one of study, started"):
        store.append({"event": "epochs"})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append(started(1, parameters={"learning_rate": math.nan}))


def test_a_completed_trial_that_was_edited_to_nonsense_counts_as_failed(store: RunStore) -> None:
    store.append(started(1))
    line = json.dumps(completed(1, point(certified_accuracy=math.nan)))
    with store.file.open("a") as file:
        file.write(line + "\n")
    records = read_records(store.path)
    assert records.trials["t0001"].status == "failed"
    assert "certified_accuracy is nan" in (records.trials["t0001"].error or "")
    assert records.points() == []


def test_non_finite_bounds_and_metrics_become_null(store: RunStore) -> None:
    store.append(started(1))
    store.append({"event": "epoch", "trial": "t0001", "epoch": 1, "metrics": {"loss": math.inf, "acc": 0.5}})
    rows = [[0, 3, "UNKNOWN", True, -math.inf, "bounds", 0.1]]
    store.append({**verdicts("t0001", []), "samples": rows})
    trial = read_records(store.path).trials["t0001"]
    assert trial.epochs[0]["metrics"] == {"loss": None, "acc": 0.5}
    assert trial.verdicts["dense"][0][4] is None


# --- torn lines, second drivers, readers ---------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b'{"event":"started","tri', b"{", b"\xff\xfe", b"[1]", b'{"event":"unheard"}'])
def test_a_torn_line_costs_only_itself(store: RunStore, torn: bytes) -> None:
    store.append(started(1))
    with store.file.open("ab") as file:
        file.write(torn)
    records = read_records(store.path)
    assert (list(records.trials), records.damaged_lines) == (["t0001"], 1)
    store.append(started(2))
    store.append(started(3))
    records = read_records(store.path)
    assert (list(records.trials), records.damaged_lines) == (["t0001", "t0002", "t0003"], 1)


def test_a_line_may_tear_anywhere(store: RunStore) -> None:
    store.append(started(1))
    whole = store.file.read_bytes()
    store.append(completed(1))
    last = store.file.read_bytes()[len(whole) :]
    for length in [*range(0, len(last) - 3, 29), *range(len(last) - 3, len(last) + 1)]:
        store.file.write_bytes(whole + last[:length])
        status = read_records(store.path).trials["t0001"].status
        assert status == ("completed" if length >= len(last) - 1 else "running")
        store.append(started(2))
        assert "t0002" in read_records(store.path).trials


def test_events_of_a_trial_that_never_started_are_counted_as_damage(store: RunStore) -> None:
    store.append(completed(7, point("t0007")))
    records = read_records(store.path)
    assert (records.points(), records.damaged_lines) == ([], 1)


def _write_many(path: str, count: int) -> None:
    store = RunStore(path)
    for number in range(1, count + 1):
        store.append(started(number))


def test_a_run_is_readable_while_another_process_writes(store: RunStore) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_write_many, args=(str(store.path), 50))
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(len(read_records(store.path).trials))
    writer.join()
    records = read_records(store.path)
    assert writer.exitcode == 0
    assert (len(records.trials), records.damaged_lines) == (50, 0)
    assert seen == sorted(seen)


def test_one_driver_per_run(store: RunStore) -> None:
    with store.lock():
        with pytest.raises(UserError, match="in use by another driver"), RunStore(store.path).lock():
            pass
        read_records(store.path)  # readers need no lock
    with RunStore(store.path).lock():
        pass


def test_there_has_to_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no run here .*folder of runs/"):
        read_records(tmp_path / "nowhere")


def test_records_of_a_newer_version_are_not_guessed_at(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append({"event": "study", "schema": 2})
    with pytest.raises(UserError, match="schema 2; this version reads 1"):
        read_records(tmp_path)


def test_checkpoints_are_whole_files(store: RunStore) -> None:
    assert store.save_checkpoint("t0001", b"one").read_bytes() == b"one"
    path = store.save_checkpoint("t0001", b"two")
    assert path == store.path / "checkpoints" / "t0001.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"two"


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(store: RunStore) -> tuple[Path, Records]:
    sizes = {1: (80, 1000), 2: (85, 900), 3: (60, 100)}  # the first is beaten by the second
    for number, (certified, size) in sizes.items():
        trial = f"t{number:04d}"
        store.append(started(number))
        store.append(
            completed(number, point(trial, "prune:gu-l1:0.9", certified, size, standard_accuracy=1 / 3, extra=0.1))
        )
    records = read_records(store.path)
    write_tables(store.path, records, FRONT)
    return store.path, records


def test_the_tables_have_the_columns_that_others_rely_on(written: tuple[Path, Records]) -> None:
    run, _ = written
    points, front = (pd.read_csv(run / f"{name}.csv") for name in ("points", "front"))
    assert list(points.columns) == [*COLUMNS, "extra"]
    assert list(front.columns) == list(points.columns)
    assert list(points.on_front) == [False, True, True]
    assert list(front.trial) == ["t0002", "t0003"]
    assert front.on_front.all()


def test_numbers_read_back_as_they_were(written: tuple[Path, Records]) -> None:
    run, records = written
    with (run / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, original in zip(rows, records.points(), strict=True):
        assert {key: type(value)(row[key]) for key, value in original.items()} == original


def test_tables_are_made_anew_from_the_records(written: tuple[Path, Records]) -> None:
    run, records = written
    before = (run / "points.csv").read_bytes(), (run / "front.csv").read_bytes()
    (run / "points.csv").write_text("spoilt")
    (run / "front.csv").unlink()
    write_tables(run, records, FRONT)
    assert ((run / "points.csv").read_bytes(), (run / "front.csv").read_bytes()) == before


def test_a_run_without_points_has_empty_tables(store: RunStore) -> None:
    write_tables(store.path, read_records(store.path), FRONT)
    assert (store.path / "points.csv").read_text() == ",".join(COLUMNS) + "\n"
