"""The larger architectures train, also with whole channels removed from the members."""

from typing import Any

import pytest

from cactus_ray.data import DataSet
from cactus_ray.training.loop import EpochReport, train


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ({"name": "cnn5", "width": 0.2}, "gs-l2"),
        ({"name": "resnet18", "width": 0.06, "batch_norm": True}, "ls-grad"),
        ({"name": "resnet18", "width": 0.06, "batch_norm": False}, "gs-l2"),
    ],
)
def test_loss_falls(model: dict[str, Any], family: str, run_config: Any, few_digits: DataSet) -> None:
    config = run_config(
        method="cactus", model=model, threat={"epsilon": 0.005}, compression_set={"family": family},
        train={"epochs": 3, "batch_size": 32, "warmup": 0.0, "ramp": 0.0},
    )  # fmt: skip
    reports: list[EpochReport] = []
    train(config, few_digits, report=lambda r: reports.append(r) is None)
    losses = [r.metrics["loss"] for r in reports]
    assert losses[0] > losses[1] > losses[2]
