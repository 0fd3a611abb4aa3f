"""Proxies at compression levels after an epoch: of the network that a level would deploy, and at a cost."""

import math
from typing import Any

import pytest
import torch

from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.size import ideal_bits
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import calibration, load
from cactus_ray.training.evaluate import proxy_accuracies
from cactus_ray.training.loop import EpochReport, train
from cactus_ray.training.workers import Alone

LEVELS = ("dense", "prune:gu-l1:0.5+rebn+int4")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_score_is_that_of_the_deployed_network(batch_norm: bool) -> None:
    config = parse(RunConfig, {
        "data": {"name": "digits", "train_samples": 256}, "threat": {"epsilon": 0.02}, "method": "ibp",
        "model": {"name": "mlp", "hidden": [16], "batch_norm": batch_norm},
        "train": {"epochs": 2, "batch_size": 64}, "learning_rate": 0.02,
    })  # fmt: skip
    data = load(config.data, ("train", "selection"))
    found: list[dict[str, float]] = []
    seconds: list[tuple[float, float]] = []

    def report(epoch: EpochReport) -> bool:
        before = epoch.metrics["seconds"]
        found.append(epoch.score(LEVELS))
        seconds.append((before, epoch.metrics["seconds"]))
        return True

    result = train(config, data, report=report)
    plain = train(config, data, report=lambda epoch: True)
    for name, tensor in plain.network.params.items():
        assert torch.equal(tensor, result.network.params[name]), name
    for level in LEVELS:
        graph, params = result.network.graph, result.network.params
        compressed = materialize(graph, params, parse_level(level), calibration(data))
        expected = proxy_accuracies(
            compressed.graph, compressed.params, *data.split("selection"), config.threat, Alone()
        )
        names = (f"standard_accuracy@{level}", f"ibp_certified_accuracy@{level}")
        assert [found[-1][name] for name in names] == pytest.approx(list(expected))
        assert found[-1][f"ideal_bits@{level}"] == ideal_bits(compressed)
    assert found[-1]["standard_accuracy@dense"] > 0.2  # chance is 0.1
    assert all(after > before for before, after in seconds)
    assert result.seconds == pytest.approx(math.fsum(after for _, after in seconds))


def test_a_level_that_does_not_fit_is_nan_and_training_goes_on() -> None:
    data = load(parse(RunConfig, BASE).data, ("train", "selection"))
    found: list[dict[str, float]] = []

    def report(epoch: EpochReport) -> bool:
        found.append(epoch.score(["fp16"]))
        return True

    start = train(parse(RunConfig, BASE), data, report=lambda epoch: True).network
    huge = {name: tensor * 1e6 for name, tensor in start.params.items()}
    start.params.update(huge)
    train(parse(RunConfig, {**BASE, "method": "standard"}), data, report=report, init=start)
    assert all(math.isnan(value) for value in found[0].values())


BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_samples": 64}, "threat": {"epsilon": 0.02}, "method": "ibp",
    "model": {"name": "mlp", "hidden": [8]}, "train": {"epochs": 1, "batch_size": 64},
}  # fmt: skip
