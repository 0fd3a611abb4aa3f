"""What a study does once its own trials have ended: fresh samples, replicates, and drivers that die meanwhile."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from course import MEASURES, REFERENCE, SPACE, result, started

from cactus_ray.search.checkpoints import prune_checkpoints
from cactus_ray.search.chunks import Chunk, ChunkResult
from cactus_ray.search.explain import explain
from cactus_ray.search.replicates import replicate_seed
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records, with_front, write_tables
from cactus_ray.search.study import Study
from cactus_ray.search.upkeep import Upkeep

FRESH = (5, 6, 7)
LARGER = {**MEASURES, "bytes": 1500}


def space(**search: Any) -> Space:
    return parse_space({**SPACE, "search": {"trials": 2, "sampler": "random", **search}}, "course.yaml")


def begin(asked: Space, run: Path, fresh: tuple[int, ...] = ()) -> Study:
    study = Study(asked, RunStore(run), Records(), [0, 1, 2], fresh=fresh)
    study.begin({"name": "course", "seed": 0}, REFERENCE)
    return study


def resume(asked: Space, run: Path, fresh: tuple[int, ...] = ()) -> Study:
    return Study(asked, RunStore(run), read_records(run), [0, 1, 2], fresh=fresh)


def mixed(chunk: Chunk, certified: int, **more: Any) -> ChunkResult:
    """Verdicts of which as many are CERTIFIED as ``certified`` says of the indices from 0 on."""
    found = result(chunk, **more)
    for level in found.levels.values():
        level.samples[:] = [row if row[0] < certified else [*row[:2], "FALSIFIED", *row[3:]] for row in level.samples]
    return found


def complete(study: Study, certified: int = 3, **more: Any) -> str:
    trial = started(study).id
    for chunk in study.trained(trial, {"last": trial.encode()}, "last", 1, 2.0):
        study.verified(mixed(chunk, certified, **more))
    return trial


def searched(study: Study) -> tuple[str, str]:
    """Both trials of the search: one on the front, one dominated."""
    return complete(study), complete(study, 1, measures=LARGER)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- fresh samples


def test_points_of_the_front_are_verified_once_more_when_the_search_is_over(tmp_path: Path) -> None:
    asked = space()
    study = begin(asked, tmp_path, FRESH)
    assert study.afterwards() == []
    good, _ = searched(study)
    before = read_records(tmp_path).points()
    assert not study.done
    chunks = study.afterwards()
    assert [(c.trial, c.indices) for c in chunks] == [(good, (5, 6)), (good, (7,))]
    assert study.afterwards() == []
    assert not study.done
    for chunk in chunks:
        study.verified(mixed(chunk, 7))
        study.verified(mixed(chunk, 0))  # a second delivery changes nothing
    assert study.done
    records = read_records(tmp_path)
    assert records.points() == before
    assert {row[0] for rows in records.trials[good].verdicts.values() for row in rows.values()} == {0, 1, 2}
    again = records.trials[good].again
    assert again is not None
    assert [(p["split"], p["n_certified"], p["samples"]) for p in again.points] == [("selection-fresh", 2, 3)] * 2
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {(e["event"], e["split"]) for e in lines if "split" in e} == {
        ("verdicts", "selection"), ("fresh", "selection-fresh"),
    }  # fmt: skip
    write_tables(tmp_path, records, asked.front)
    rows = table(tmp_path / "front.csv")
    assert {(r["trial"], r["certified_accuracy"], r["fresh_n_certified"], r["fresh_samples"]) for r in rows} == {
        (good, "1.0", "2", "3")
    }  # fmt: skip
    assert resume(asked, tmp_path, FRESH).done


def test_a_driver_that_dies_among_fresh_verdicts_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    asked = space()
    first = begin(asked, tmp_path, FRESH)
    good, _ = searched(first)
    chunk, other = first.afterwards()
    first.verified(mixed(chunk, 9))
    second = resume(asked, tmp_path, FRESH)
    assert not second.done
    assert second.resume() == []
    (left,) = second.afterwards()
    assert (left.trial, left.indices) == (good, other.indices)
    second.verified(mixed(left, 0))
    assert second.done
    again = read_records(tmp_path).trials[good].again
    assert again is not None
    assert {p["n_certified"] for p in again.points} == {2}


def test_a_failure_on_fresh_samples_stands_and_its_reason_is_shown(tmp_path: Path) -> None:
    """Later drivers do not try again what is recorded as failed; what a dead one had begun is no failure."""
    asked = space()
    study = begin(asked, tmp_path, FRESH)
    good, _ = searched(study)
    study.verified(mixed(study.afterwards()[0], 9))
    second = resume(asked, tmp_path, FRESH)
    assert len(second.afterwards()) == 1
    second.refused(good, "level int8: overflow")
    assert second.done
    third = resume(asked, tmp_path, FRESH)
    assert third.afterwards() == []
    assert third.done
    records = read_records(tmp_path)
    found = explain(asked, records, good)["points"]
    assert [(p["level"], p["fresh_error"]) for p in found] == [(v, "level int8: overflow") for v in asked.levels]
    assert not any("fresh_samples" in point for point in found)
    write_tables(tmp_path, records, asked.front)
    assert {row["fresh_error"] for row in table(tmp_path / "front.csv")} == {"level int8: overflow"}


def test_where_no_verifier_survived_nothing_is_tried_again(tmp_path: Path) -> None:
    asked = space()
    study = begin(asked, tmp_path, FRESH)
    good, _ = searched(study)
    for chunk in study.afterwards():
        study.given_up(chunk, "verifier_died", [0] * len(chunk.indices))
    assert study.done
    assert resume(asked, tmp_path, FRESH).done
    again = read_records(tmp_path).trials[good].again
    assert again is not None
    assert again.refused == dict.fromkeys(asked.levels, f"no verifier survived level {asked.levels[0]}")


def test_what_cannot_be_verified_again_is_named_and_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = begin(space(), tmp_path / "a", FRESH)
    good, _ = searched(study)
    chunks = study.afterwards()
    study.refused(good, "level int8: overflow")
    assert study.done
    assert study.verified(mixed(chunks[0], 9)) == []  # late news
    again = read_records(tmp_path / "a").trials[good].again
    assert again is not None
    assert (again.points, again.error) == ([], "level int8: overflow")
    assert read_records(tmp_path / "a").trials[good].status == "completed"
    gone = begin(space(), tmp_path / "b", FRESH)
    good, _ = searched(gone)
    gone.checkpoint(good).unlink()
    assert gone.afterwards() == []
    assert gone.done
    assert "its network is gone" in caplog.text


# --- replicates


def test_replicates_follow_the_search_and_are_no_part_of_it(tmp_path: Path) -> None:
    asked = space(seeds=2, max_trials=2, plateau=5)
    study = begin(asked, tmp_path)
    first = started(study).id
    second = started(study).id
    assert study.next_trial() is None
    for trial, certified in ((first, 3), (second, 1)):
        for chunk in study.trained(trial, {"last": b"network"}, "last", 1, 2.0):
            study.verified(mixed(chunk, certified, measures=MEASURES if trial == first else LARGER))
    assert not study.done
    start = started(study)
    original = read_records(tmp_path).trials[first]
    assert start.id == f"{first}-s2"
    assert start.config.seed == replicate_seed(original.seed, 2)
    assert {**start.config.to_dict(), "seed": original.seed} == original.config
    assert (start.asked, start.scored) == ((), ())
    assert study.next_trial() is None
    assert study.epoch(start.id, 1, 2, {"loss": 1.0})
    for chunk in study.trained(start.id, {"last": b"another"}, "last", 1, 3.0):
        study.verified(mixed(chunk, 2))
    assert study.done
    records = read_records(tmp_path)
    replicate = records.trials[start.id]
    assert (replicate.origin, replicate.of, replicate.replicate) == ("replicate", first, 2)
    assert {p["n_certified"] for p in replicate.points} == {2}
    assert {p["trial"] for p in with_front(records, asked.front)} == {first, second}
    assert study.budget.training[start.id] == 3.0
    write_tables(tmp_path, records, asked.front)
    row = table(tmp_path / "front.csv")[0]
    assert (row["seeds"], row["certified_accuracy_max"], row["over_seeds"]) == ("2", "1.0", "non-dominated")
    assert float(row["certified_accuracy_mean"]) == pytest.approx(5 / 6)
    others = table(tmp_path / "replicates.csv")
    assert {(r["of"], r["trial"], r["level"]) for r in others} == {
        (first, start.id, "dense"), (first, start.id, "int8"),
    }  # fmt: skip
    assert prune_checkpoints(tmp_path, records, asked.front) == [second, start.id]
    assert resume(asked, tmp_path).done


def test_more_trials_later_are_drawn_as_if_there_had_been_no_replicates(tmp_path: Path) -> None:
    hashes = []
    for folder, seeds in (("with", 2), ("without", 1)):
        study = begin(space(seeds=seeds, sampler="tpe"), tmp_path / folder)
        searched(study)
        if seeds == 2:
            complete(study)
        more = resume(space(seeds=seeds, sampler="tpe", trials=4), tmp_path / folder)
        found = [started(more), started(more)]
        assert [start.id for start in found] == ["t0003", "t0004"]
        hashes.append([start.config.config_hash for start in found])
    assert hashes[0] == hashes[1]


def test_a_driver_that_dies_among_replicates_goes_on_with_the_same_ones(tmp_path: Path) -> None:
    asked = space(seeds=3)
    first = begin(asked, tmp_path)
    smaller = {**MEASURES, "bytes": 900}
    a, b = complete(first), complete(first, 2, measures=smaller)
    training = started(first)
    assert training.id == f"{a}-s2"
    second = resume(asked, tmp_path)
    again = started(second)
    assert (again.id, again.config, again.asked) == (training.id, training.config, ())
    assert second.next_trial() is None  # what is left of the round is asked for when this one has ended
    for chunk in second.trained(again.id, {"last": b"x"}, "last", 1, 1.0):
        second.verified(mixed(chunk, 2))
    assert complete(second, 1, measures=smaller) == f"{b}-s2"
    assert complete(second, 2) == f"{a}-s3"  # b is smaller than whoever may be better, and settled by that
    assert second.done
    assert [t.status for t in read_records(tmp_path).trials.values()] == ["completed"] * 5


def test_a_replicate_that_fails_counts_nowhere_and_ends_the_round(tmp_path: Path) -> None:
    study = begin(space(seeds=2), tmp_path)
    good, _ = searched(study)
    study.failed(started(study).id, "the loss is not finite at step 7", 7)
    assert study.done
    assert study.finished == 2
    assert read_records(tmp_path).trials[f"{good}-s2"].error == "the loss is not finite at step 7"


def test_a_limit_of_hours_holds_for_replicates(tmp_path: Path) -> None:
    study = begin(space(seeds=2, max_hours=1.0), tmp_path, FRESH)
    searched(study)
    now = study.budget.clock()
    study.budget.clock = lambda: now + 7200.0
    assert study.next_trial() is None
    assert study.afterwards() == []
    assert study.done


def test_a_replicate_is_verified_dearly_where_its_original_was(tmp_path: Path) -> None:
    """A point that was spared dear verification is compared with replicates that are spared it, too."""
    asked = parse_space(
        {**SPACE, "search": {"trials": 1, "sampler": "random", "seeds": 2}, "verification": {"bound": "branch"}}
    )
    study = begin(asked, tmp_path)

    def open_at_int8(start: str) -> list[Chunk]:
        dear: list[Chunk] = []
        for chunk in study.trained(start, {"last": b"network"}, "last", 1, 2.0):
            found = result(chunk)
            worse = [[*row[:2], "FALSIFIED" if row[0] else "UNKNOWN", True, -1.0, "bounds", 0.1] for row in
                     found.levels["int8"].samples]  # fmt: skip
            found.levels["int8"].samples[:] = worse
            dear += study.verified(found)
        return dear

    first = started(study).id
    assert open_at_int8(first) == []
    assert read_records(tmp_path).trials[first].spared == {"int8": [first, "dense"]}
    assert open_at_int8(started(study).id) == []
    assert study.done


def test_explain_tells_of_seeds_and_of_fresh_samples(tmp_path: Path) -> None:
    asked = space(seeds=2)
    study = begin(asked, tmp_path, FRESH)
    good, bad = searched(study)
    for chunk in study.afterwards():
        study.verified(mixed(chunk, 0))
    replicate = complete(study, 2)
    records = read_records(tmp_path)
    point = explain(asked, records, good)["points"][0]
    assert (point["seeds"], point["over_seeds"]) == (2, "non-dominated")
    assert (point["certified_accuracy_min"], point["certified_accuracy_max"]) == (pytest.approx(2 / 3), 1.0)
    assert (point["fresh_samples"], point["fresh_n_certified"]) == (3, 0)
    assert "seeds" not in explain(asked, records, bad)["points"][0]
    found = explain(asked, records, replicate)
    assert (found["of"], found["replicate"]) == (good, 2)
    assert found["points"][0]["certified_accuracy"] == pytest.approx(2 / 3)
    assert found["points"][0]["original"]["certified_accuracy"] == 1.0


def test_upkeep_keeps_the_leader_and_no_replicate(tmp_path: Path) -> None:
    asked = space(seeds=2)
    upkeep = Upkeep(asked, RunStore(tmp_path), Records())
    study = Study(asked, RunStore(tmp_path), Records(), [0, 1, 2], [upkeep.event])
    study.begin({"name": "course", "seed": 0}, REFERENCE)
    good, bad = searched(study)
    start = started(study)
    chunks = study.trained(start.id, {"last": b"replicate"}, "last", 1, 2.0)
    assert study.checkpoint(start.id).is_file()
    for chunk in chunks:
        study.verified(mixed(chunk, 9, measures={**MEASURES, "bytes": 1}))  # better than all, and yet no candidate
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"{good}.safetensors"]
    upkeep.write()
    assert [(r["trial"], r["on_front"]) for r in table(tmp_path / "points.csv")] == [
        (good, "True"), (good, "True"), (bad, "False"), (bad, "False"),
    ]  # fmt: skip
    for verdicts in (True, False):
        records = read_records(tmp_path, verdicts=verdicts)
        assert records.damaged_lines == 0
        assert records.trials[start.id].ledger == {"ibp": pytest.approx(0.4)}
