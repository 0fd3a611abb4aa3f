"""Two stages of verification as a study sees them, and drivers that die between them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from course import MEASURES, SPACE, begin, result, resume, started

from cactus_ray.search.chunks import Chunk
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study


@pytest.fixture
def dear_space() -> Space:
    return parse_space({**SPACE, "verification": {"bound": "branch"}}, "course.yaml")


def cheap_stage(study: Study, *, left: int = 2) -> tuple[str, list[Chunk]]:
    """A trial whose cheap stage certified all but the first samples; its dear chunks."""
    trial = started(study).id
    dear: list[Chunk] = []
    for chunk in study.trained(trial, {"last": b"network"}, "last", 1, 2.0):
        assert chunk.stage == "cheap"
        found = result(chunk)
        for level in found.levels.values():
            level.samples[:] = [
                [*row[:2], "UNKNOWN", True, -0.25, "bounds", 0.75] if row[0] < left else row for row in level.samples
            ]
        dear += study.verified(found)
    return trial, dear


def test_only_what_the_cheap_stage_left_open_is_verified_dearly(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial, dear = cheap_stage(study)
    assert [(c.stage, c.indices, c.levels, c.spent) for c in dear] == [
        ("dear", (0,), ("dense", "int8"), 0.75),
        ("dear", (1,), ("dense", "int8"), 0.75),
    ]
    assert read_records(tmp_path).trials[trial].status == "trained"
    study.verified(result(dear[0], "CERTIFIED", "branch"))
    assert study.verification.states
    study.verified(result(dear[1], "UNKNOWN", "nodes"))
    point = read_records(tmp_path).trials[trial].points[0]
    assert (point["n_certified"], point["n_unknown"], point["samples"]) == (2, 1, 3)


def test_samples_that_levels_share_are_verified_together_and_others_where_they_are_open(
    dear_space: Space, tmp_path: Path
) -> None:
    study = begin(dear_space, tmp_path)
    first, last = study.trained(started(study).id, {"last": b"network"}, "last", 1, 2.0)
    found = result(first, "UNKNOWN", "bounds")
    found.levels["dense"].samples[1] = [1, 0, "FALSIFIED", True, None, "attack", 0.0]
    study.verified(found)
    dear = study.verified(result(last, "UNKNOWN", "time"))  # its seconds are spent
    assert [(c.indices, c.levels) for c in dear] == [((0,), ("dense", "int8")), ((1,), ("int8",))]


def test_a_budget_leaves_what_is_open_unknown_for_that_reason(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial, dear = cheap_stage(study)
    study.verified(result(dear[0], "CERTIFIED", "branch"))
    study.given_up(dear[1], "budget", [0])
    record = read_records(tmp_path).trials[trial]
    assert record.status == "completed"
    assert record.verdicts["dense"][1] == [1, 0, "UNKNOWN", True, -0.25, "budget", 0.75]
    assert record.points[0]["n_unknown"] == 1


def test_dear_work_can_be_skipped_where_it_cannot_matter(dear_space: Space, tmp_path: Path) -> None:
    asked = []

    def worth(point: Any) -> bool:
        asked.append((point["level"], point["n_unknown"]))
        return bool(point["level"] == "int8")

    study = begin(dear_space, tmp_path)
    study.verification.worth = worth
    trial, dear = cheap_stage(study)
    assert [(c.indices, c.levels) for c in dear] == [((0,), ("int8",)), ((1,), ("int8",))]
    assert asked == [("dense", 2), ("int8", 2)]
    for chunk in dear:
        study.verified(result(chunk, "CERTIFIED", "alpha"))
    points = {p["level"]: p["n_unknown"] for p in read_records(tmp_path).trials[trial].points}
    assert points == {"dense": 2, "int8": 0}


def test_dear_work_that_others_overtook_while_it_waited_is_withdrawn(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    slow = started(study).id
    dear: list[Chunk] = []
    for chunk in study.trained(slow, {"last": b"network"}, "last", 1, 2.0):
        found = result(chunk)
        for level in found.levels.values():
            for row in level.samples:
                row[2:6] = ["FALSIFIED", True, None, "attack"] if row[0] == 2 else ["UNKNOWN", True, -0.25, "bounds"]
        dear += study.verified(found)
    waiting, last = dear
    assert study.still_worth(waiting) == ("dense", "int8")
    best = started(study).id
    for chunk in study.trained(best, {"last": b"better"}, "last", 1, 2.0):
        worse = result(chunk)
        larger = replace(worse.levels["int8"], measures={**MEASURES, "bytes": 2000})
        worse.levels["int8"] = larger  # only its dense point is small and good enough
        study.verified(worse)
    before = read_records(tmp_path).trials[slow].verdicts
    assert study.still_worth(waiting) == ()
    assert study.withdrawn(waiting) == []
    assert study.withdrawn(waiting) == []  # a second word changes nothing
    assert study.verification.states
    assert study.given_up(last, "budget", [0]) == []
    record = read_records(tmp_path).trials[slow]
    assert (record.status, record.spared) == ("completed", {level: [best, "dense"] for level in ("dense", "int8")})
    assert record.verdicts == before
    assert record.dear == {}
    assert resume(dear_space, tmp_path).in_flight == 0


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_trial_that_breaks_a_constraint_spares_nobody_who_may_keep_it(
    tmp_path: Path, met: bool, resumed: bool
) -> None:
    limit = {"metric": "bytes@int8", "max": 500 if met else 400}
    asked = parse_space({**SPACE, "verification": {"bound": "branch"}, "constraints": [limit]}, "course.yaml")
    study = begin(asked, tmp_path)
    best = started(study).id
    for chunk in study.trained(best, {"last": b"best"}, "last", 1, 2.0):
        study.verified(result(chunk, measures={**MEASURES, "bytes": 500}))
    if resumed:
        study = resume(asked, tmp_path)
    later = started(study).id
    dear: list[Chunk] = []
    for chunk in study.trained(later, {"last": b"later"}, "last", 1, 2.0):
        found = result(chunk, "UNKNOWN", "bounds")
        found.levels["int8"] = replace(found.levels["int8"], measures={**MEASURES, "bytes": 300})
        for row in found.levels["dense"].samples:  # of both levels
            row[2:6] = ["FALSIFIED", True, None, "attack"] if row[0] == 2 else row[2:6]
        dear += study.verified(found)
    spared = read_records(tmp_path).trials[later].spared
    assert {c.levels for c in dear} == {("int8",) if met else ("dense", "int8")}
    assert spared == ({"dense": [best, "dense"]} if met else {})


def test_levels_that_are_still_worth_it_are_verified_without_the_others(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial, (first, last) = cheap_stage(study)
    study.verification.worth = lambda point: bool(point["level"] == "int8")
    assert study.still_worth(first) == ("int8",)
    for chunk in (first, last):
        found = result(chunk, "CERTIFIED", "branch")
        del found.levels["dense"]
        assert study.verified(found) == []
    record = read_records(tmp_path).trials[trial]
    assert record.status == "completed"
    assert {p["level"]: p["n_unknown"] for p in record.points} == {"dense": 2, "int8": 0}
    assert set(record.dear) == {"int8"}


# --- drivers that died ---------------------------------------------------------------------------------------------


def chunk_ids(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    return [line["chunk"] for line in lines if line["event"] == "verdicts"]


@pytest.mark.parametrize("done", range(5))
def test_a_driver_that_dies_during_verification_loses_and_repeats_no_chunk(
    dear_space: Space, tmp_path: Path, done: int
) -> None:
    """There are two cheap chunks and two dear ones; the first driver records ``done`` of them."""
    study = begin(dear_space, tmp_path)
    todo = study.trained(started(study).id, {"last": b"network"}, "last", 1, 2.0)
    for _ in range(done):
        chunk = todo.pop(0)
        todo += study.verified(result(chunk, *(("UNKNOWN", "bounds") if chunk.indices == (0, 1) else ())))
    before = (tmp_path / "trials.jsonl").read_bytes()
    if done == 4:  # killed between the last verdicts and the word that the trial is complete
        lines = before.splitlines(keepends=True)
        assert b"completed" in lines[-1]
        (tmp_path / "trials.jsonl").write_bytes(before := b"".join(lines[:-1]))
    second = resume(dear_space, tmp_path)
    assert second.in_flight == 1
    rest = second.resume()
    assert {c.id for c in rest} >= {c.id for c in todo}
    while rest:
        chunk = rest.pop(0)
        rest += second.verified(result(chunk, *(("UNKNOWN", "bounds") if chunk.id.endswith("cheap/0,1/0-1") else ())))
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(before)
    ids = chunk_ids(tmp_path)
    assert len(ids) == len(set(ids)) == 4
    (point, _) = next(iter(read_records(tmp_path).trials.values())).points
    assert (point["n_certified"], point["samples"]) == (3, 3)


def test_what_was_spent_and_lost_before_is_known_to_the_next_driver(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial, dear = cheap_stage(study)
    study.lost(dear[0], "verifier_died", 4.0)
    second = resume(dear_space, tmp_path)
    assert second.spent == {trial: pytest.approx(4.4)}
    assert second.losses == {dear[0].id: 1}
    assert read_records(tmp_path).ledger() == pytest.approx({"ibp": 0.4, "lost": 4.0})


def test_a_checkpoint_that_is_not_the_verified_one_is_trained_again(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial, dear = cheap_stage(study)
    study.checkpoint(trial).write_bytes(b"spoilt")
    second = resume(dear_space, tmp_path)
    assert second.resume() == []
    assert started(second).id == trial
    again = second.trained(trial, {"last": b"network"}, "last", 1, 2.0)  # the same weights: verdicts still hold
    assert [c.id for c in again] == [c.id for c in dear]


def test_verdicts_recorded_before_there_were_stages_are_the_last_word(dear_space: Space, tmp_path: Path) -> None:
    study = begin(dear_space, tmp_path)
    trial = started(study).id
    study.trained(trial, {"last": b"network"}, "last", 1, 2.0)
    rows = [[i, 0, "UNKNOWN", True, -1.0, "bounds", 0.1] for i in (0, 1, 2)]
    old = {"event": "verdicts", "trial": trial, "level": "dense", "split": "selection", "chunk": f"{trial}/dense/0"}
    study.store.append({**old, "samples": rows, "measures": MEASURES, "seconds": 0.5})
    second = resume(dear_space, tmp_path)
    chunks = second.resume()
    assert [(c.stage, c.levels, c.indices) for c in chunks] == [
        ("cheap", ("int8",), (0, 1)),
        ("cheap", ("int8",), (2,)),
    ]
    for chunk in chunks:
        assert second.verified(result(chunk)) == []
    assert read_records(tmp_path).trials[trial].status == "completed"
    assert read_records(tmp_path).trials[trial].points[0]["n_unknown"] == 3
