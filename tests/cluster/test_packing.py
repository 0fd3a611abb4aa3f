"""How many trials share a GPU: what decides it, what a lack of memory changes, and the same on a Ray with a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.tune
import torch
from tiny_study import REFERENCE, space

from cactus_ray.cluster import train_workers
from cactus_ray.cluster.desk import Desk
from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.cluster.packing import MOST, Packing, Profile, dearest, decided, loosened, measured, packed, room
from cactus_ray.cluster.resources import plan
from cactus_ray.cluster.train_workers import TrainJob, ran_out_of_gpu
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.models.network import load as load_network
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study
from cactus_ray.training.loop import TrainResult, train

GB = 10**9
MANY = {"trials": 8, "sampler": "random"}


def gpu(total: float, held: float, context: float) -> Profile:
    return Profile("a GPU", int(held * GB / 2), int(held * GB), int(context * GB), int(total * GB))


def shared(search: dict[str, Any] = MANY, **resources: Any) -> Space:
    beside = {"gpus_per_worker": 1, "verifiers": 1, "gpus_per_verifier": 0}
    return space(resources={**beside, **resources}, search=search)


@pytest.mark.parametrize(
    ("total", "held", "context", "expected"),
    [
        (80, 1.0, 0.5, MOST),
        (16, 6.7, 0.5, 2),
        (16, 6.8, 0.5, 1),  # 14.6 of the 14.4 GB that the margin leaves
        (8, 20.0, 0.5, 1),  # one is always tried
    ],
)
def test_room_is_what_fits_beside_the_margin(total: float, held: float, context: float, expected: int) -> None:
    assert room(gpu(total, held, context)) == expected


def never() -> Profile:
    raise AssertionError("nothing hangs on a profile here")


def test_a_profile_decides_and_is_kept_with_the_number() -> None:
    found = decided(shared(), None, lambda: gpu(16, 4.0, 0.5))
    assert found is not None
    assert found.to_dict() == {
        "trials_per_gpu": 3, "why": "by profile",
        "profile": {
            "device": "a GPU", "peak": 2 * GB, "held": 4 * GB, "context": GB // 2, "total": 16 * GB,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "lowered", "number", "why"),
    [
        (shared(trials_per_gpu=6), None, 6, "as resources say"),
        (shared(trials_per_gpu=6), 3, 3, "an earlier trial ran out of memory"),
        (shared(gpus_per_worker=0.25), 8, 4, "as resources say"),
        (shared(gpus_per_worker=0.25), 1, 1, "an earlier trial ran out of memory"),
        (shared({**MANY, "concurrency": 1}), None, 1, "search.concurrency is 1"),
        (shared(), 1, 1, "an earlier trial ran out of memory"),
    ],
)
def test_without_a_question_nothing_is_profiled(asked: Space, lowered: int | None, number: int, why: str) -> None:
    assert decided(asked, lowered, never) == Packing(number, why)


def test_where_seconds_of_training_count_trials_are_alone() -> None:
    timed = space(
        resources={"gpus_per_worker": 1}, search=MANY,
        objectives=[{"metric": "mean_certified_accuracy"}, {"metric": "train_seconds"}],
    )  # fmt: skip
    found = decided(timed, None, never)
    assert found is not None
    assert (found.per_gpu, "train_seconds" in found.why) == (1, True)


@pytest.mark.parametrize("resources", [{"gpus_per_worker": 0}, {"gpus_per_worker": 2}, {"workers": 2}])
def test_without_a_gpu_to_share_there_is_nothing_to_decide(resources: dict[str, Any]) -> None:
    assert decided(shared(**resources), None, never) is None


def test_a_profile_that_fails_leaves_each_trial_its_gpu_and_says_why() -> None:
    found = (
        decided(shared(), None, lambda: measured([], shared().data, False)) if not torch.cuda.is_available() else None
    )
    if found is not None:
        assert found == Packing(1, "no profile: torch sees no GPU where a trial would train")

    def spoilt() -> Profile:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = decided(shared(), None, spoilt)
    assert found is not None
    assert (found.per_gpu, "CUDA out of memory" in found.why) == (1, True)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_trials_and_verifiers_together_take_one_gpu(number: int) -> None:
    tight = packed(shared(gpus_per_verifier=0.25), number)
    shares = plan(tight, {"CPU": 32.0, "GPU": 1.0})
    assert shares.training == int(0.75 * number + 1e-9)
    assert shares.resources.gpus_per_worker == pytest.approx(1 / number)


@pytest.mark.parametrize(
    ("had", "verifiers", "left"),
    [
        (0.25, 0.0, 2), (0.5, 0.0, 1), (1 / 3, 0.0, 1), (1.0, 0.0, None),
        (0.25, 0.25, 2), (1 / 3, 0.25, 2),  # no trial has a whole GPU beside the verifier
        (0.5, 0.25, None), (0.0, 0.0, None),
    ],
)  # fmt: skip
def test_a_lack_of_memory_halves_until_a_trial_has_all_that_there_is(
    had: float, verifiers: float, left: int | None
) -> None:
    looser = loosened(shared(gpus_per_verifier=verifiers), had, {"CPU": 32.0, "GPU": 1.0})
    assert (None if looser is None else round(1 / looser.resources.gpus_per_worker)) == left


def test_the_dearest_configurations_have_the_largest_model_and_batch_in_every_method() -> None:
    wide = space(
        model={"name": "cnn_small"}, search=MANY,
        parameters={
            "method": {"values": ["cactus", "ibp"]}, "model.width": {"values": [2.0, 0.5]},
            "train.batch_size": {"values": [128, 32]}, "learning_rate": {"min": 0.001, "max": 0.01},
        },
    )  # fmt: skip
    found = dearest(wide)
    assert {c.method for c in found} == {"cactus", "ibp"}
    assert {(c.model.width, c.train.batch_size) for c in found} == {(2.0, 128)}
    assert {c.learning_rate for c in found} == {0.001, 0.01}


@pytest.mark.parametrize(
    "resources",
    [
        {"trials_per_gpu": 2},
        {"trials_per_gpu": 2, "gpus_per_worker": 0.5},
        {"trials_per_gpu": 2, "gpus_per_worker": 1, "workers": 2},
    ],
)
def test_what_cannot_be_shared_is_refused(resources: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"trials_per_gpu: got 2; expected auto or 1 unless"):
        space(resources=resources)


def test_auto_is_a_word_for_the_default_and_other_words_are_refused() -> None:
    assert shared(trials_per_gpu="auto") == shared()
    with pytest.raises(ConfigError, match=r"trials_per_gpu: got 'many'; expected auto or a whole number in \[1"):
        shared(trials_per_gpu="many")


def test_only_a_lack_of_gpu_memory_counts_as_one() -> None:
    wrapped = UserError("model.factory failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    yes = [
        torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"), wrapped,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]  # fmt: skip
    no = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError("CUDA error")]
    assert [ran_out_of_gpu(error) for error in yes] == [True] * 4
    assert [ran_out_of_gpu(error) for error in no] == [False] * 3


class _Mail:
    """A mailbox without Ray: ``put.remote`` and ``take.remote`` of the actor."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.put = SimpleNamespace(remote=self.messages.append)
        self.take = SimpleNamespace(remote=self._take)

    def _take(self) -> list[Any]:
        taken = list(self.messages)
        self.messages.clear()
        return taken


def test_a_trial_that_runs_out_in_training_is_trained_again_with_more_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Desk, study and trainable as in a search, one call after the other instead of Ray's processes."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    room_left, real = [False, False, True], train_workers.train

    def crowded_train(*arguments: Any, **options: Any) -> TrainResult:
        if not room_left.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(*arguments, **options)

    monkeypatch.setattr(train_workers, "train", crowded_train)
    asked = shared({"trials": 1}, trials_per_gpu=4, execution="direct")
    cluster = {"CPU": 8.0, "GPU": 1.0}
    study = Study(asked, RunStore(tmp_path), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    pool: Any = SimpleNamespace(broker=SimpleNamespace(full=False), submit=lambda job: None)
    mail, first = _Mail(), plan(packed(asked, 4), cluster)
    desk = Desk(study, first, pool, mail, lambda gpus: loosened(asked, gpus, cluster))
    job = TrainJob("tiny", "direct", 1, 1.0, 1, str(tmp_path), False, state_seconds=1e9)
    had = []
    while isinstance(found := desk.next_configuration(0.0), dict):
        had.append(found["gpus"])
        train_workers.train_trial(found, job, mail)
        desk.take_mail()
    assert had == [0.25, 0.5, 1.0]
    record = read_records(tmp_path)
    (trial,) = record.trials.values()
    assert (trial.status, record.lowered, trial.gpus, trial.lacks) == ("trained", 1, 1.0, 2)
    config = parse(RunConfig, trial.config)
    plain = real(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network.params
    kept = load_network(tmp_path / str(trial.checkpoint)).params
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain.items())


# --- on a Ray that believes in a GPU -------------------------------------------------------------------------------


@pytest.fixture
def crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trials run out of memory below half a GPU; the file tells what each had."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("CACTUS_TEST_DRIVER", str(os.getpid()))
    monkeypatch.setenv("CACTUS_TEST_GPUS", "0.5")
    monkeypatch.setenv("CACTUS_TEST_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def studied(asked: Space, run: Path) -> tuple[Records, list[dict[str, Any]]]:
    study = Study(asked, RunStore(run), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=4, gpus=1, trust_code=True))
    return read_records(run), [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]


def crowded_space(search: dict[str, Any], **resources: Any) -> Space:
    resources = {
        "gpus_per_worker": 1, "cpus_per_worker": 0.5, "verifiers": 1, "gpus_per_verifier": 0, **resources
    }  # fmt: skip
    return space(
        resources=resources, search=search, model={"factory": "crowded_network:crowded"},
        parameters={"method": {"value": "ibp"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    )  # fmt: skip


@pytest.mark.ray
def test_trials_that_do_not_fit_together_are_tried_again_by_twos(crowd: Path, tmp_path: Path) -> None:
    asked = crowded_space({"trials": 2, "sampler": "random"}, trials_per_gpu=4, execution="direct")
    records, events = studied(asked, tmp_path / "run")
    assert [t.status for t in records.trials.values()] == ["completed"] * 2
    assert [(e["trials_per_gpu"], e["why"]) for e in events if e["event"] == "packing"] == [(4, "as resources say")]
    ooms = [e for e in events if e["event"] == "oom"]
    assert ooms
    assert {(e["trials_per_gpu"], e["had"]) for e in ooms} == {(2, 0.25)}  # halved once, however many had a quarter
    assert "Tried to allocate 20.00 GiB" in ooms[0]["error"]
    notes = crowd.read_text().split("\n")[:-1]
    assert sorted(notes) == ["0.25 0"] * len(ooms) + ["0.5 0"] * 2
    assert {t.gpus for t in records.trials.values()} == {0.5}
    trial = records.trials[ooms[0]["trial"]]
    config = parse(RunConfig, trial.config)
    plain = train(config, load(config.data, ("train", "selection")), report=lambda epoch: True, trust_code=True)
    kept = load_network(tmp_path / "run" / str(trial.checkpoint)).params
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain.network.params.items())
    later = Study(asked, RunStore(tmp_path / "run"), records, list(range(40)))
    assert decided(asked, later.lowered, never) == Packing(2, "an earlier trial ran out of memory")


@pytest.mark.ray
def test_a_trial_that_does_not_fit_a_whole_gpu_fails_by_name(
    crowd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACTUS_TEST_GPUS", "2")
    records, events = studied(crowded_space({"trials": 1}, trials_per_gpu=2), tmp_path / "run")  # through Ray Train
    (trial,) = records.trials.values()
    assert trial.status == "failed"
    assert "out of memory with 1 GPU and no other trial on it; a smaller model" in str(trial.error)
    assert "Tried to allocate 20.00 GiB" in str(trial.error)
    assert crowd.read_text().split() == ["0.5", "0", "1", "0"]
    assert [e["trials_per_gpu"] for e in events if e["event"] in ("packing", "oom")] == [2, 1]
