"""Studies on a small real Ray: both ways to train, verifiers that die, trials that fail, networks without a bound."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cactus_ray.cluster import connect
from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.cluster.verifier_pool import ChunkFailure, VerifierContext, VerifierPool
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.errors import RunFailedError
from cactus_ray.models.network import load as load_network
from cactus_ray.models.network import pack
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records, with_front
from cactus_ray.search.study import Chunk, ChunkResult, Study
from cactus_ray.training.loop import train

pytestmark = pytest.mark.ray

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 256},
    "model": {"name": "mlp", "hidden": [16]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense", "int8"],
    "train": {"epochs": 2, "batch_size": 64},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 1, "concurrency": 1},
    "verification": {"samples": 40, "attack_steps": 5, "batch_size": 10},
}
REFERENCE = {"certified_accuracy": 0.0, "bytes": 1e5, "standard_accuracy": 0.0}


def space(**changes: Any) -> Space:
    return parse_space({**SPACE, **changes}, "tiny.yaml")


def run(tiny: Space, folder: Path) -> Records:
    study = Study(tiny, RunStore(folder), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=4))
    return read_records(folder)


def test_direct_and_ray_train_give_the_same_weights_as_a_plain_call(tmp_path: Path) -> None:
    found = {}
    for execution in ("direct", "train"):
        records = run(space(resources={"execution": execution, "verifiers": 1}), tmp_path / execution)
        trial = records.trials["t0001"]
        assert trial.status == "completed", trial.error
        assert len(trial.epochs) == 2
        found[execution] = load_network(tmp_path / execution / str(trial.checkpoint)).params
    config = parse(RunConfig, trial.config)
    plain = train(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network.params
    for name, tensor in plain.items():
        assert torch.equal(tensor, found["direct"][name]), name
        assert torch.equal(tensor, found["train"][name]), name


def test_two_workers_train_one_network(tmp_path: Path) -> None:
    longer = {**SPACE["train"], "epochs": 8}
    fast = {"method": {"value": "cactus"}, "learning_rate": {"value": 0.01}}
    records = run(space(resources={"workers": 2, "verifiers": 1}, train=longer, parameters=fast), tmp_path)
    trial = records.trials["t0001"]
    assert trial.status == "completed", trial.error
    assert trial.epochs[-1]["metrics"]["standard_accuracy"] > 0.3  # chance is 0.1


def test_a_study_at_concurrency_one_is_reproducible_and_failures_stay_off_the_front(tmp_path: Path) -> None:
    parameters = {"method": {"value": "cactus"}, "train.l1": {"values": [0.0, 1e-6, 1e38]}}
    tiny = space(parameters=parameters, search={"trials": 3, "concurrency": 1, "sampler": "random"})
    once, again = run(tiny, tmp_path / "a"), run(tiny, tmp_path / "b")

    def figures(records: Records) -> list[Any]:
        columns = ("trial", "level", "n_certified", "n_falsified", "n_unknown", "standard_accuracy", "bytes")
        return [[p[c] for c in columns] for p in records.points()]

    assert figures(once) == figures(again)
    assert [t.config_hash for t in once.trials.values()] == [t.config_hash for t in again.trials.values()]
    statuses = {t.parameters["train.l1"]: t.status for t in once.trials.values()}
    assert statuses[1e38] == "failed"
    failed = next(t for t in once.trials.values() if t.status == "failed")
    assert "not finite at step" in str(failed.error)
    assert failed.id not in {p["trial"] for p in with_front(once, tiny.front)}
    assert len(once.points()) == 4


def test_a_training_process_that_dies_fails_its_trial_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the workers
    monkeypatch.setenv("CACTUS_TEST_DRIVER", str(os.getpid()))
    deadly = space(model={"factory": "deadly_network:deadly"}, parameters={"method": {"value": "ibp"}})
    study = Study(deadly, RunStore(tmp_path), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=2, trust_code=True))
    records = read_records(tmp_path)
    assert records.trials["t0001"].status == "failed"
    assert "died" in str(records.trials["t0001"].error)
    assert records.points() == []


def test_a_falsified_certificate_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(space(), RunStore(tmp_path), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)

    def unsound(self: VerifierPool, timeout: float) -> list[ChunkResult | ChunkFailure]:
        time.sleep(timeout)
        if not self.queue:
            return []
        return [ChunkFailure(self.queue.popleft().chunk, "unsound ibp bound of sample 3", unsound=True)]

    monkeypatch.setattr(VerifierPool, "poll", unsound)
    with pytest.raises(RunFailedError, match=r"t0001.*sample 3.*trusted"):
        run_study(study, DriverOptions(cpus=2))
    records = read_records(tmp_path)
    assert records.finished is not None
    assert records.finished["status"] == "failed"
    assert records.points() == []


@pytest.fixture
def small_ray() -> Iterator[None]:
    with connect.connected(None, cpus=2):
        yield


@pytest.fixture(scope="module")
def trained() -> tuple[Space, bytes]:
    tiny = space()
    config = tiny.configuration({"learning_rate": 0.005}, 1)
    return tiny, pack(train(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network)


def make_pool(tiny: Space, count: int) -> VerifierPool:
    return VerifierPool(VerifierContext(tiny.data, tiny.threat, tiny.verification, 1), count, {"CPU": 1.0})


def drain(pool: VerifierPool, wanted: int, seconds: float = 90.0) -> list[ChunkResult | ChunkFailure]:
    found: list[ChunkResult | ChunkFailure] = []
    deadline = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        found += pool.poll(0.05)
    return found


@pytest.mark.usefixtures("small_ray")
def test_a_killed_verifier_loses_nothing(trained: tuple[Space, bytes]) -> None:
    tiny, network = trained
    pool = make_pool(tiny, 2)
    chunks = [Chunk(f"t/dense/{i}", "t", "dense", tuple(range(10 * i, 10 * i + 10))) for i in range(4)]
    victim = ray.get(pool.idle[-1].pid.remote())  # the last is handed the first chunk
    pool.submit(chunks, network)
    found = pool.poll(0.0)
    os.kill(victim, signal.SIGKILL)
    found += drain(pool, 4 - len(found))
    assert sorted(f.chunk.id for f in found) == [c.id for c in chunks]
    assert all(isinstance(f, ChunkResult) and len(f.samples) == 10 and f.measures["bytes"] > 0 for f in found)
    pool.close()


@pytest.mark.usefixtures("small_ray")
def test_a_chunk_that_kills_every_verifier_ends_unknown(
    trained: tuple[Space, bytes],
) -> None:
    tiny, network = trained
    pool = make_pool(tiny, 1)
    pool.chunk_seconds = 0.0  # every chunk counts as hung at once
    pool.submit([Chunk("t/dense/0", "t", "dense", (3, 4))], network)
    (found,) = drain(pool, 1)
    assert isinstance(found, ChunkResult)
    assert [(row[0], row[2], row[5]) for row in found.samples] == [
        (3, "UNKNOWN", "verifier_hung"),
        (4, "UNKNOWN", "verifier_hung"),
    ]
    assert found.measures == {}
    pool.close()


@pytest.mark.usefixtures("small_ray")
def test_a_level_that_does_not_fit_is_reported_and_the_verifier_lives_on(trained: tuple[Space, bytes]) -> None:
    tiny, network = trained
    pool = make_pool(tiny, 1)
    pool.submit([Chunk("t/nonsense/0", "t", "nonsense", (0,)), Chunk("t/int8/0", "t", "int8", (0,))], network)
    failure, good = drain(pool, 2)
    assert isinstance(failure, ChunkFailure)
    assert "nonsense" in str(failure.error)
    assert isinstance(good, ChunkResult)
    pool.close()
