"""Drivers, training processes and verifiers are killed at random moments: what comes out is the same."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos import TRAINER, VERIFIER, Search, adopting, leftovers, plain_network, wait_for

from cactus_ray.search.attempts import DEATHS
from cactus_ray.search.budget import train_seconds
from cactus_ray.search.halving import replayed
from cactus_ray.search.in_flight import FOLDER
from cactus_ray.search.rungs import Rungs
from cactus_ray.search.space import load_space
from cactus_ray.search.store import Records, read_records

pytestmark = pytest.mark.ray

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits"},
    "model": {"name": "cnn_small"},
    "threat": {"epsilon": 0.05},
    "levels": ["dense", "int8"],
    "train": {"epochs": 8, "batch_size": 32},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 4, "concurrency": 1, "sampler": "random"},
    "verification": {"samples": 100, "attack_steps": 10, "bound": "alpha"},
    "resources": {"cheap_samples": 20, "dear_samples": 2, "state_seconds": 0.0},
    "wandb": {"mode": "disabled"},
}
SECONDS = ("train_seconds", "verify_seconds")


def command(space: Path, runs: Path) -> list[str]:
    main = "from cactus_ray.cli import main; main()"
    return [sys.executable, "-c", main, "search", str(space), "--runs", str(runs)]


def events(run: Path) -> list[dict[str, Any]]:
    """Whole records; a line that a killed driver tore is none."""
    found = []
    for line in (run / "trials.jsonl").read_bytes().split(b"\n") if (run / "trials.jsonl").exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def torment(search: Search, run: Path, victims: list[str], pauses: list[float]) -> None:
    """Kill one victim after the other, each after its pause, and let the search end.

    What was written stays as it was written. The pause before a part of the driver is killed begins when there is one.
    """
    written = b""

    def started() -> None:
        nonlocal written
        now = (run / "trials.jsonl").read_bytes() if (run / "trials.jsonl").exists() else b""
        assert now.startswith(written)
        written = now
        search.start()

    started()
    for victim, pause in zip(victims, pauses, strict=True):
        part = victim in (TRAINER, VERIFIER)
        if part:
            assert wait_for(lambda part=victim: bool(search.parts(part)) or not search.running, 300)
        time.sleep(pause)
        assert search.running, f"too short, it ended after {search.kills}: {search.log.read_text()[-3000:]}"
        if part:
            search.kill_part(victim)
            continue
        number = signal.Signals[victim]
        status = search.kill_driver(number)
        assert status in ((-number,) if number == signal.SIGKILL else (130, -number)), search.log.read_text()[-3000:]
        started()
    assert search.wait(900) == 0, search.log.read_text()[-3000:]
    assert (run / "trials.jsonl").read_bytes().startswith(written)


def outcome(records: Records) -> dict[str, Any]:
    """All that does not depend on how long something took or how often it was tried."""
    return {
        trial.id: {
            "number": trial.number, "config": trial.config, "status": trial.status, "network": trial.sha256,
            "points": [{k: v for k, v in point.items() if k not in SECONDS} for point in trial.points],
            "verdicts": {level: sorted(row[:6] for row in rows.values()) for level, rows in trial.verdicts.items()},
        }
        for trial in records.trials.values()
    }  # fmt: skip


def assert_nothing_twice(run: Path) -> None:
    found = events(run)
    for kind in ("study", "past"):
        assert sum(e["event"] == kind for e in found) <= 1
    for kind in ("started", "trained", "completed", "failed", "stopped"):
        assert set(Counter(e["trial"] for e in found if e["event"] == kind).values()) <= {1}, kind
    assert set(Counter(e["chunk"] for e in found if e["event"] == "verdicts").values()) == {1}


def assert_ledger_makes_sense(records: Records, search: Search) -> None:
    """One trial trains at a time, and one verifier verifies: neither can have worked longer than the drivers lived."""
    worked, lived = sum(records.drivers), search.seconds
    assert 0 < worked <= lived
    training = {trial.id: train_seconds(trial) for trial in records.trials.values()}
    assert all(math.isfinite(seconds) for seconds in training.values())
    assert 0 < sum(training.values()) <= worked
    assert 0 < sum(records.ledger().values()) <= lived
    for trial in records.trials.values():
        assert training[trial.id] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_kills_change_no_network_and_repeat_no_verdict(tmp_path: Path) -> None:
    short = {"train": {"epochs": 6, "batch_size": 32}, "search": {**SPACE["search"], "trials": 2}}
    file, run = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    file.write_text(yaml.safe_dump({**SPACE, **short}))
    search = Search(command(file, run.parent), tmp_path / "log")
    with adopting():
        choose = random.Random(3)
        torment(search, run, [TRAINER, VERIFIER, "SIGKILL"], [choose.uniform(0.0, 3.0) for _ in range(3)])
        assert leftovers() == {}
    records = read_records(run)
    for trial in records.trials.values():
        assert trial.status == "completed", trial.error
        assert trial.sha256 == plain_network(trial.config)
        assert {len(rows) for rows in trial.verdicts.values()} == {100}
        assert all(row[5] != "verifier_died" for rows in trial.verdicts.values() for row in rows.values())
    assert_nothing_twice(run)
    assert_ledger_makes_sense(records, search)
    assert not list((run / FOLDER).iterdir())


VICTIMS = [TRAINER, VERIFIER, "SIGKILL", "SIGKILL", "SIGINT"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    through, broken = tmp_path / "through" / "tiny", tmp_path / "broken" / "tiny"
    with adopting():
        calm = Search(command(file, tmp_path / "through"), tmp_path / "through.log")
        calm.start()
        assert calm.wait(900) == 0, calm.log.read_text()[-3000:]
        assert leftovers() == {}
        wild = Search(command(file, tmp_path / "broken"), tmp_path / "broken.log")
        choose = random.Random(20261121)
        victims = [choose.choice(VICTIMS) for _ in range(20)]
        torment(wild, broken, victims, [choose.uniform(0.0, 15.0) for _ in victims])
        assert leftovers() == {}
    theirs, ours = read_records(through), read_records(broken)
    assert outcome(ours) == outcome(theirs)
    assert all(trial.status == "completed" for trial in ours.trials.values())
    assert_nothing_twice(broken)
    assert_ledger_makes_sense(ours, wild)
    assert not list((broken / FOLDER).iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_no_record_of_a_search_with_tpe_and_halving(tmp_path: Path) -> None:
    """Which trials are drawn depends on which ended before; what is on record never changes, and decisions replay."""
    halving = {"sampler": "tpe", "scheduler": {"name": "asha", "reduction": 2}, "trials": 16}
    file, run = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    file.write_text(yaml.safe_dump({**SPACE, "search": {**SPACE["search"], **halving}}))
    search = Search(command(file, run.parent), tmp_path / "log")
    choose = random.Random(20261122)
    victims = [choose.choice(VICTIMS) for _ in range(20)]
    with adopting():
        torment(search, run, victims, [choose.uniform(0.0, 15.0) for _ in victims])
        assert leftovers() == {}
    records = read_records(run)
    trials = records.trials.values()
    assert len(trials) == halving["trials"]
    for trial in trials:
        assert trial.status in ("completed", "stopped") or f"{DEATHS} times" in str(trial.error), trial.error
    complete = [trial for trial in trials if trial.status == "completed"]
    assert complete
    for trial in complete:
        assert trial.sha256 == plain_network(trial.config)
        assert {len(rows) for rows in trial.verdicts.values()} == {100}
    assert_nothing_twice(run)
    assert_ledger_makes_sense(records, search)
    assert not list((run / FOLDER).iterdir())
    decisions = [decision for trial in trials for decision in trial.rungs]
    again = replayed(Rungs(load_space(file), Records()).halving.rules, decisions)
    assert again
    assert sorted(map(str, again)) == sorted(map(str, decisions))
