"""Studies on a small real Ray: both ways to train, trials that fail, certificates that are false."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import REFERENCE, SPACE, run, space

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.cluster.verifier import ChunkFailure
from cactus_ray.cluster.verifier_pool import Outcome, VerifierPool
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.errors import RunFailedError
from cactus_ray.models.network import load as load_network
from cactus_ray.search.store import Records, RunStore, read_records, with_front
from cactus_ray.search.study import Event, Study
from cactus_ray.training.loop import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


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


def test_a_limit_of_hours_ends_a_trial_in_flight_and_leaves_it_to_a_later_driver(tmp_path: Path) -> None:
    late = [0.0]

    def tick(event: Event) -> None:  # two hours pass with the first epoch of a trial that would train for days
        late[0] = 7200.0 if event["event"] == "epoch" else late[0]

    endless = {**SPACE["train"], "epochs": 1_000_000}
    tiny = space(train=endless, search={"trials": 3, "concurrency": 1, "max_hours": 1.5})
    study = Study(tiny, RunStore(tmp_path), Records(), list(range(40)), [tick])
    study.budget.clock = lambda: time.monotonic() + late[0]
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=2))
    records = read_records(tmp_path)
    assert records.finished is not None
    assert records.finished["status"] == "limit"
    assert "search.max_hours" in records.finished["reason"]
    assert [t.status for t in records.trials.values()] == ["running"]
    assert records.trials["t0001"].epochs


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

    def unsound(self: VerifierPool, timeout: float) -> list[Outcome]:
        time.sleep(timeout)
        starts, _ = self.broker.assign(0.0)
        return [ChunkFailure(start.chunk, "unsound ibp bound of sample 3", True, 0.1) for start in starts]

    monkeypatch.setattr(VerifierPool, "poll", unsound)
    with pytest.raises(RunFailedError, match=r"t0001.*sample 3.*trusted"):
        run_study(study, DriverOptions(cpus=2))
    records = read_records(tmp_path)
    assert records.finished is not None
    assert records.finished["status"] == "failed"
    assert records.points() == []
