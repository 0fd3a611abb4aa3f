"""Verifiers that die or hang, networks that no bound understands, drivers that are killed: what is lost, what not."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from tiny_study import REFERENCE, SPACE, space

from cactus_ray.bounds.graph import Graph, Node
from cactus_ray.cluster import connect
from cactus_ray.cluster.broker import Broker, Job, Limits, Lost
from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.cluster.verifier import ChunkFailure, VerifierContext
from cactus_ray.cluster.verifier_pool import Outcome, VerifierPool
from cactus_ray.data import load
from cactus_ray.models.network import Network, pack
from cactus_ray.search.chunks import Chunk, ChunkResult
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study
from cactus_ray.training.loop import train

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained() -> tuple[Space, Network]:
    tiny = space()
    config = tiny.configuration({"learning_rate": 0.005}, 1)
    return tiny, train(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network


def make_pool(
    tiny: Space, network: Network, count: int, resources: dict[str, float] | None = None, **limits: Any
) -> VerifierPool:
    data = pack(network)
    broker = Broker(Limits(**limits), [f"v{i}" for i in range(count)])
    context = VerifierContext(tiny.data, tiny.threat, tiny.verification, 1)
    return VerifierPool(context, broker, resources or {"CPU": 1.0}, lambda trial: data)


def job(*starts: int, count: int = 10, levels: tuple[str, ...] = ("dense", "int8")) -> Job:
    chunks = [Chunk(f"t/cheap/{i}", "t", "cheap", levels, tuple(range(i, i + count))) for i in starts]
    return Job("t", 1, 1000, chunks)


def drain(pool: VerifierPool, wanted: int, seconds: float = 250.0) -> list[Outcome]:
    """What comes until ``wanted`` chunks have ended, losses that are tried again among them."""
    found: list[Outcome] = []
    deadline = time.monotonic() + seconds
    while sum(not isinstance(f, Lost) or f.over for f in found) < wanted and time.monotonic() < deadline:
        found += pool.poll(0.05)
    return found


def pid_of(pool: VerifierPool, slot: str) -> int:
    return int(ray.get(pool.actors[slot].pid.remote()))


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("how", "reason"), [(signal.SIGKILL, "verifier_died"), (signal.SIGSTOP, "verifier_hung")])
def test_a_verifier_that_dies_or_hangs_loses_nothing(trained: tuple[Space, Network], how: int, reason: str) -> None:
    pool = make_pool(*trained, 2)
    victim = pid_of(pool, "v0")
    pid_of(pool, "v1")  # both are up
    pool.submit(job(0, 10, 20, 30))
    os.kill(victim, how)
    found: list[Outcome] = []
    if how == signal.SIGSTOP:  # the other verifier does the rest; then no patience is left
        found = drain(pool, 3)
        pool.broker.limits = replace(pool.broker.limits, hang_seconds=0.0)
    while not any(isinstance(f, Lost) for f in found):
        found += pool.poll(0.05)
    pool.broker.limits = Limits()  # the new one takes its time to start
    found += drain(pool, 4 - sum(isinstance(f, ChunkResult) for f in found))
    (lost,) = [f for f in found if isinstance(f, Lost)]
    assert (lost.reason, lost.over) == (reason, False)
    results = [f for f in found if isinstance(f, ChunkResult)]
    assert sorted(f.chunk.id for f in results) == [f"t/cheap/{i}" for i in (0, 10, 20, 30)]
    for result in results:
        assert set(result.levels) == {"dense", "int8"}
        for level in result.levels.values():
            assert [row[0] for row in level.samples] == list(result.chunk.indices)
            assert level.measures["bytes"] > 0
        assert result.seconds == pytest.approx(sum(level.seconds for level in result.levels.values()))
        assert {"clean", "attack", "ibp", "overhead"} <= set(result.ledger)
    assert pool.broker.spent["t"] == pytest.approx(sum(f.seconds for f in found))
    pool.close()


@pytest.mark.usefixtures("shared_ray")
def test_a_chunk_that_kills_every_verifier_is_given_up_and_the_next_one_verified(
    trained: tuple[Space, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(*trained, 1)
    send = pool._send

    def deadly(start: Any) -> None:
        victim = pid_of(pool, start.slot) if start.chunk.id == "t/cheap/0" else None
        if victim is not None:
            os.kill(victim, signal.SIGSTOP)  # so that it cannot be done too soon
        send(start)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(pool, "_send", deadly)
    pool.submit(job(0, 10))
    found = drain(pool, 2)
    lost, results = [f for f in found if isinstance(f, Lost)], [f for f in found if isinstance(f, ChunkResult)]
    assert [(f.chunk.id, f.over) for f in lost] == [("t/cheap/0", False), ("t/cheap/0", False), ("t/cheap/0", True)]
    assert [f.chunk.id for f in results] == ["t/cheap/10"]
    pool.close()


@pytest.mark.usefixtures("shared_ray")
def test_a_level_that_does_not_fit_is_reported_and_the_verifier_lives_on(trained: tuple[Space, Network]) -> None:
    pool = make_pool(*trained, 1)
    pool.submit(job(0, levels=("dense", "nonsense")))
    pool.submit(job(10))
    failure, good = drain(pool, 2)
    assert isinstance(failure, ChunkFailure)
    assert failure.error.startswith("level nonsense: ")
    assert not failure.unsound
    assert isinstance(good, ChunkResult)
    pool.close()


@pytest.fixture
def ray_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray believes in a GPU that is not there: enough for who gets which part of it."""
    for name, value in connect.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_with_a_gpu")
def test_four_verifiers_share_one_gpu(trained: tuple[Space, Network]) -> None:
    pool = make_pool(*trained, 4, {"CPU": 1.0, "GPU": 0.25})
    assert len({pid_of(pool, slot) for slot in pool.actors}) == 4
    assert ray.available_resources().get("GPU", 0.0) == 0.0
    pool.submit(job(0, 10))
    assert all(isinstance(f, ChunkResult) for f in drain(pool, 2))
    pool.close()


# --- whole studies -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shared_ray")
def test_a_bad_network_costs_its_own_trial_only(trained: tuple[Space, Network], tmp_path: Path) -> None:
    """Trained trials wait for verdicts: of an unsupported graph, of NaN, of logits that overflow, and of a good one."""
    _, good = trained
    tiny = space(search={"trials": 4})
    study = Study(tiny, RunStore(tmp_path), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    odd = Graph((*good.graph.nodes, Node("odd", "sigmoid", (good.graph.output.name,))), good.graph.input_shape)
    nan = {name: torch.full_like(p, torch.nan) for name, p in good.params.items()}
    huge = {name: 1e30 * p for name, p in good.params.items()}
    for network in (replace(good, graph=odd), replace(good, params=nan), replace(good, params=huge), good):
        start = study.next_trial()
        assert start is not None
        study.trained(start.id, {"last": pack(network)}, "last", 2, 1.0)
    resumed = Study(tiny, RunStore(tmp_path), read_records(tmp_path), list(range(40)))
    run_study(resumed, DriverOptions(cpus=2))
    unsupported, spoilt, overflow, fine = read_records(tmp_path).trials.values()
    assert [t.status for t in (unsupported, spoilt, overflow, fine)] == ["failed", "failed", "completed", "completed"]
    assert "'sigmoid'" in str(unsupported.error)
    assert "NaN" in str(spoilt.error)
    assert unsupported.points == spoilt.points == []
    assert {row[5] for rows in overflow.verdicts.values() for row in rows.values()} == {"non_finite"}
    assert [(p["n_certified"], p["n_unknown"]) for p in overflow.points] == [(0, 40), (0, 40)]
    assert fine.points[0]["n_certified"] > 0


@pytest.mark.usefixtures("shared_ray")
def test_a_verifier_killed_in_mid_study_costs_its_seconds_only(
    trained: tuple[Space, Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = trained
    study = Study(space(), RunStore(tmp_path), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    start = study.next_trial()
    assert start is not None
    study.trained(start.id, {"last": pack(network)}, "last", 2, 1.0)
    send, sent = VerifierPool._send, []

    def second_is_killed(self: VerifierPool, start: Any) -> None:
        sent.append(start.chunk.id)
        victim = pid_of(self, start.slot) if len(sent) == 2 else None
        if victim is not None:
            os.kill(victim, signal.SIGSTOP)
        send(self, start)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(VerifierPool, "_send", second_is_killed)
    run_study(Study(space(), RunStore(tmp_path), read_records(tmp_path), list(range(40))), DriverOptions(cpus=2))
    (trial,) = read_records(tmp_path).trials.values()
    assert trial.status == "completed"
    assert {len(rows) for rows in trial.verdicts.values()} == {40}
    assert all(row[5] != "verifier_died" for rows in trial.verdicts.values() for row in rows.values())
    assert trial.losses == {sent[1]: 1}
    assert sent.count(sent[1]) == 2
    assert trial.ledger["lost"] > 0


def lines(run: Path) -> list[dict[str, Any]]:
    whole = (run / "trials.jsonl").read_text().splitlines()
    return [json.loads(line) for line in whole if line.endswith("}")]


def killed_when(command: list[str], run: Path, reached: Any, seconds: float = 240.0) -> bytes:
    """Start a search, SIGKILL its driver once ``reached`` holds of its records, and return what it left."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + seconds
    while not ((run / "trials.jsonl").exists() and reached(lines(run))):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return (run / "trials.jsonl").read_bytes()


@pytest.mark.timeout(900)
def test_a_driver_killed_in_mid_verification_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Killed once in the cheap stage and once in the dear one; then the same verdicts as of an undisturbed study."""
    plain = {
        **SPACE, "model": {"name": "cnn_small"}, "threat": {"epsilon": 0.1}, "wandb": {"mode": "disabled"},
        "train": {"epochs": 4, "batch_size": 64},
        "parameters": {
            "method": {"value": "ibp"}, "learning_rate": {"value": 0.005}, "standard_weight": {"value": 1.0},
        },
        "verification": {
            "samples": 200, "attack_steps": 5, "bound": "branch", "max_nodes": 50, "seconds_per_sample": 1000,
        },
        "resources": {"cheap_samples": 10, "dear_samples": 1},
    }  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(plain))

    def command(runs: str) -> list[str]:
        main = "from cactus_ray.cli import main; main()"
        return [sys.executable, "-c", main, "search", str(file), "--runs", str(tmp_path / runs)]

    def verdicts(stage: str) -> Any:
        return lambda events: sum(e["event"] == "verdicts" and e["stage"] == stage for e in events) >= 2

    run = tmp_path / "broken" / "tiny"
    first = killed_when(command("broken"), run, verdicts("cheap"))
    assert b'"completed"' not in first
    second = killed_when(command("broken"), run, verdicts("dear"))
    for runs in ("broken", "through"):
        subprocess.run(command(runs), check=True, capture_output=True, timeout=240)
    last = (run / "trials.jsonl").read_bytes()
    assert last.startswith(second)
    assert second.startswith(first)
    chunks = Counter(e["chunk"] for e in lines(run) if e["event"] == "verdicts")
    assert set(chunks.values()) == {1}
    broken, through = read_records(run), read_records(tmp_path / "through" / "tiny")
    (ours,), (theirs,) = broken.trials.values(), through.trials.values()
    assert (ours.status, theirs.status) == ("completed", "completed")
    assert set(chunks) == {e["chunk"] for e in lines(tmp_path / "through" / "tiny") if e["event"] == "verdicts"}

    def plain_rows(record: Any) -> dict[str, Any]:
        return {level: sorted(row[:6] for row in rows.values()) for level, rows in record.verdicts.items()}

    assert plain_rows(ours) == plain_rows(theirs)
    assert any(indices for indices in ours.dear.values())
    seconds = ("train_seconds", "verify_seconds")
    for one, other in zip(ours.points, theirs.points, strict=True):
        assert {k: v for k, v in one.items() if k not in seconds} == {
            k: v for k, v in other.items() if k not in seconds
        }
