"""The course of a study: what is recorded, what is told, and what a driver that died leaves behind."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from course import SPACE, begin, result, resume, started

from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records, with_front
from cactus_ray.search.study import Study
from cactus_ray.search.work import ALIVE_SECONDS


@pytest.fixture
def space() -> Space:
    return parse_space(SPACE, "course.yaml")


def complete(study: Study) -> str:
    trial = started(study).id
    for chunk in study.trained(trial, {"last": b"network"}, "last", 1, 2.0):
        study.verified(result(chunk))
    return trial


def test_a_trial_is_complete_when_every_chunk_is_verified(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    trial = started(study).id
    first, last = study.trained(trial, {"last": b"network"}, "last", 1, 2.0)
    assert (first.indices, last.indices) == ((0, 1), (2,))
    assert (first.stage, first.levels) == ("cheap", ("dense", "int8"))
    study.verified(result(first))
    assert read_records(tmp_path).trials[trial].status == "trained"
    mixed = result(last)
    mixed.levels["int8"].samples[0] = [2, 0, "UNKNOWN", True, -0.5, "bounds", 0.01]
    assert study.verified(mixed) == []
    record = read_records(tmp_path).trials[trial]
    assert record.status == "completed"
    by_level = {p["level"]: p for p in record.points}
    assert (by_level["dense"]["n_certified"], by_level["int8"]["n_certified"]) == (3, 2)
    assert by_level["int8"]["n_unknown"] == 1
    assert by_level["int8"]["certified_accuracy"] == pytest.approx(2 / 3)
    assert by_level["int8"]["verify_seconds"] == pytest.approx(0.2)
    assert record.metrics["certified_accuracy@int8"] == pytest.approx(2 / 3)


def test_best_and_last_are_both_kept_and_the_chosen_one_is_verified(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    trial = started(study).id
    study.trained(trial, {"last": b"late", "best": b"good"}, "best", 1, 2.0)
    folder = tmp_path / "checkpoints"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        f"{trial}.safetensors": b"good", f"{trial}.last.safetensors": b"late",
    }  # fmt: skip
    assert read_records(tmp_path).trials[trial].checkpoint == f"checkpoints/{trial}.safetensors"


def test_what_belongs_together_is_synced_once_and_told_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last verdicts with the trial's record, a rung report with its decision; both on disk before they are told."""
    scheduler = {"name": "asha", "min_epochs": 1}
    asked = {**SPACE, "train": {"epochs": 3}, "search": {**SPACE["search"], "scheduler": scheduler}}
    study = begin(parse_space(asked, "course.yaml"), tmp_path)
    told: list[str] = []
    synced: list[int] = []

    def listener(event: dict[str, Any]) -> None:
        lines = (tmp_path / "trials.jsonl").read_text().splitlines()
        assert event in [json.loads(line) for line in lines]
        told.append(event["event"])

    sync = os.fsync
    trial = started(study).id
    first, last = study.trained(trial, {"last": b"network"}, "last", 3, 2.0)
    study.listeners.append(listener)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(len(told)), sync(file)))
    study.verified(result(first))
    study.verified(result(last))
    assert (told, synced) == (["verdicts", "verdicts", "completed"], [0, 1])
    trial = started(study).id
    told.clear()
    synced.clear()
    study.epoch(trial, 1, 3, dict.fromkeys(study.rungs.halving.rules.metrics, 0.5))
    assert (told, synced) == (["epoch", "rung"], [0])


def test_verdicts_outlive_a_record_that_is_refused(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(space, tmp_path)
    chunks = study.trained(started(study).id, {"last": b"network"}, "last", 1, 2.0)
    monkeypatch.setattr("cactus_ray.search.study.trial_metrics", lambda *_: {"mean_certified_accuracy": float("nan")})
    for chunk in chunks[:-1]:
        study.verified(result(chunk))
    with pytest.raises(ValueError, match="is nan"):
        study.verified(result(chunks[-1]))
    study.end("failed", 1.0)
    events = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [e["chunk"] for e in events if e["event"] == "verdicts"] == [chunk.id for chunk in chunks]
    assert "completed" not in [e["event"] for e in events]


def test_a_chunk_that_is_delivered_twice_counts_once(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    chunks = study.trained(started(study).id, {"last": b"network"}, "last", 1, 2.0)
    study.verified(result(chunks[0]))
    before = (tmp_path / "trials.jsonl").read_bytes()
    study.verified(result(chunks[0], "FALSIFIED"))
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_failed_and_stopped_trials_count_but_have_no_points(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    study.failed(started(study).id, "the loss is not finite at step 7", 7)
    study.stopped(started(study).id, "dominated")
    good = complete(study)
    assert study.done
    assert study.next_trial() is None
    records = read_records(tmp_path)
    assert [t.status for t in records.trials.values()] == ["failed", "stopped", "completed"]
    assert {p["trial"] for p in with_front(records, space.front)} == {good}


def test_a_trial_that_failed_during_verification_never_reaches_the_front(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    trial = started(study).id
    chunks = study.trained(trial, {"last": b"network"}, "last", 1, 2.0)
    study.verified(result(chunks[0]))
    study.failed(trial, "level int8: overflow")
    study.verified(result(chunks[1]))  # late news of a trial that is over
    assert read_records(tmp_path).trials[trial].status == "failed"
    assert read_records(tmp_path).points() == []


def test_a_network_whose_verifiers_all_died_fails_the_trial(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    trial = started(study).id
    chunks = study.trained(trial, {"last": b"network"}, "last", 1, 2.0)
    for chunk in chunks:
        assert study.given_up(chunk, "verifier_died", [0] * len(chunk.indices)) == []
    record = read_records(tmp_path).trials[trial]
    assert (record.status, record.points) == ("failed", [])
    assert "no verifier survived level dense" in str(record.error)
    assert record.verdicts["int8"][2][5] == "verifier_died"


def test_a_second_driver_goes_on_where_the_first_was_killed(space: Space, tmp_path: Path) -> None:
    first = begin(space, tmp_path)
    done = complete(first)
    waiting = started(first).id
    first.trained(waiting, {"last": b"network"}, "last", 1, 2.0)
    training = started(first)
    points = read_records(tmp_path).points()

    second = resume(space, tmp_path)  # nothing was told to the first one: as after SIGKILL
    assert read_records(tmp_path).points() == points
    chunks = second.resume()
    assert {c.trial for c in chunks} == {waiting}
    assert second.checkpoint(waiting).read_bytes() == b"network"
    again = started(second)
    assert (again.id, again.config) == (training.id, training.config)
    for chunk in chunks:
        second.verified(result(chunk))
    for chunk in second.trained(again.id, {"last": b"other"}, "last", 1, 2.0):
        second.verified(result(chunk))
    assert second.done
    records = read_records(tmp_path)
    assert [t.status for t in records.trials.values()] == ["completed"] * 3
    assert records.trials[done].points == points


def test_a_trial_that_ran_out_of_memory_is_queued_again_also_by_the_next_driver(space: Space, tmp_path: Path) -> None:
    study = begin(space, tmp_path)
    study.packed({"trials_per_gpu": 4, "why": "by profile"})
    first, other = started(study), started(study)
    study.out_of_memory(first.id, {"trials_per_gpu": 2, "error": "CUDA out of memory", "had": 0.25})
    assert study.in_flight == 1
    assert (read_records(tmp_path).lowered, read_records(tmp_path).packing["trial"]) == (2, first.id)
    again = started(study)
    assert (again.id, again.config) == (first.id, first.config)
    second = resume(space, tmp_path)
    assert second.lowered == 2
    assert {started(second).id, started(second).id} == {first.id, other.id}
    second.failed(other.id, "lost")
    done = [again.id, started(second).id]
    for trial in done:
        for chunk in second.trained(trial, {"last": b"network"}, "last", 1, 2.0):
            second.verified(result(chunk))
    assert second.done
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["completed", "failed", "completed"]


def test_resuming_asks_for_the_same_configurations(space: Space, tmp_path: Path) -> None:
    through = begin(space, tmp_path / "through")
    for _ in range(3):
        complete(through)
    broken = begin(space, tmp_path / "broken")
    complete(broken)
    rest = resume(space, tmp_path / "broken")
    complete(rest)
    complete(rest)
    hashes = [[t.config_hash for t in read_records(tmp_path / d).trials.values()] for d in ("through", "broken")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3


def test_a_configuration_that_cannot_be_built_is_recorded_and_the_next_one_drawn(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cactus_ray.errors import ConfigError

    real = Space.configuration

    def refuse_first(self: Space, values: Any, number: int) -> Any:
        if number == 1:
            raise ConfigError("compression_set.low", 0.9, "at most compression_set.high = 0.5")
        return real(self, values, number)

    monkeypatch.setattr(Space, "configuration", refuse_first)
    study = begin(space, tmp_path)
    assert started(study).number == 2
    first = read_records(tmp_path).trials["t0001"]
    assert first.status == "failed"
    assert "compression_set.low" in str(first.error)


def test_a_silent_driver_says_now_and_then_that_it_works(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(space, tmp_path)
    now = time.monotonic()
    for later, lines in ((ALIVE_SECONDS - 1, 1), (ALIVE_SECONDS + 1, 2), (ALIVE_SECONDS + 2, 2)):
        monkeypatch.setattr("cactus_ray.search.journal.time.monotonic", lambda later=later: now + later)
        study.alive()
        assert (tmp_path / "trials.jsonl").read_bytes().count(b"\n") == lines
    assert read_records(tmp_path).damaged_lines == 0
