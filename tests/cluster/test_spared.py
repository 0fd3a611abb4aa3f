"""Dear verification only of what may reach the front, against dear verification of everything, on trained digits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import REFERENCE, space

from cactus_ray.cluster.verifier import Verifier, VerifierContext
from cactus_ray.data import load
from cactus_ray.models.network import pack
from cactus_ray.search.chunks import ChunkResult
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, RunStore, read_records, with_front
from cactus_ray.search.study import Study
from cactus_ray.training.loop import train

LEVELS = ["dense", "int8", "int4", "prune:gu-l1:0.7", "prune:gu-l1:0.7+int8"]
SAMPLES = 30


@pytest.fixture(scope="module")
def asked() -> Space:
    return space(
        levels=LEVELS, threat={"epsilon": 0.06}, verification={"samples": SAMPLES, "attack_steps": 5, "bound": "alpha"},
        search={"trials": 3, "sampler": "random"}, train={"epochs": 4, "batch_size": 64},
        parameters={"method": {"value": "sabr"}, "learning_rate": {"min": 0.002, "max": 0.02}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def networks(asked: Space) -> dict[int, bytes]:
    configs = {n: asked.configuration({"learning_rate": rate}, n) for n, rate in enumerate((0.02, 0.01, 0.002), 1)}
    data = load(asked.data, ("train", "selection"))
    return {n: pack(train(config, data, report=lambda epoch: True).network) for n, config in configs.items()}


def verified(asked: Space, networks: dict[int, bytes], dear: str, folder: Path) -> Records:
    tiny = replace(asked, search=replace(asked.search, dear=dear))
    study = Study(tiny, RunStore(folder), Records(), list(range(SAMPLES)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    verifier = Verifier(VerifierContext(tiny.data, tiny.threat, tiny.verification, 1))
    while (start := study.next_trial()) is not None:
        network = networks[start.number]
        chunks = study.trained(start.id, {"last": network}, "last", 4, 0.0)
        while chunks:
            found = verifier.verify(chunks.pop(0), network)
            assert isinstance(found, ChunkResult), found
            chunks += study.verified(found)
    return read_records(folder)


def test_nothing_of_the_front_is_lost_and_less_is_verified_dearly(
    asked: Space, networks: dict[int, bytes], tmp_path: Path
) -> None:
    thrifty, full = (verified(asked, networks, dear, tmp_path / dear) for dear in ("front", "all"))

    def front(records: Records) -> list[Any]:
        columns = ("trial", "level", "n_certified", "n_falsified", "n_unknown", "standard_accuracy", "bytes")
        return [[p[c] for c in columns] for p in with_front(records, asked.front) if p["on_front"]]

    def dear(records: Records) -> int:
        return sum(len(indices) for trial in records.trials.values() for indices in trial.dear.values())

    assert front(thrifty) == front(full)
    assert 0 < dear(thrifty) < dear(full)
    spared = {(t.id, level): tuple(by) for t in thrifty.trials.values() for level, by in t.spared.items()}
    points = {(p["trial"], p["level"]): p for p in with_front(full, asked.front)}
    assert spared
    for name, rival in spared.items():
        assert not points[name]["on_front"]
        assert points[rival]["bytes"] <= points[name]["bytes"]
        assert points[rival]["certified_accuracy"] >= points[name]["certified_accuracy"]
