"""Small networks and data for the tests of training."""

from typing import Any

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import DataSet, load
from cactus_ray.options import STAGE_SHARES


@pytest.fixture
def tiny() -> tuple[Graph, Params]:
    """A 2-2-2 network whose bounds can be worked out by hand."""
    nodes = (
        Node("input", "input"),
        Node("fc1", "linear", ("input",)),
        Node("relu", "relu", ("fc1",)),
        Node("fc2", "linear", ("relu",)),
    )
    params = {
        "fc1.weight": torch.tensor([[1.0, -1.0], [2.0, 1.0]]),
        "fc1.bias": torch.tensor([0.0, -1.0]),
        "fc2.weight": torch.tensor([[1.0, 0.0], [-1.0, 1.0]]),
        "fc2.bias": torch.tensor([0.5, 0.0]),
    }
    return Graph(nodes, (2,)), params


@pytest.fixture(scope="session")
def few_digits() -> DataSet:
    """256 real training digits and the selection split."""
    full = load(parse(RunConfig, run_dict()).data, ("train", "selection"))
    images = {"train": full.images["train"][:256], "selection": full.images["selection"][:128]}
    labels = {"train": full.labels["train"][:256], "selection": full.labels["selection"][:128]}
    return DataSet(full.name, full.class_names, images, labels, full.digests)


def run_dict(**changes: Any) -> dict[str, Any]:
    """A short run on digits; dotted keys change a section."""
    plain: dict[str, Any] = {
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": [24]},
        "threat": {"epsilon": 0.05},
        "train": {"epochs": 2, "warmup": 0.1, "ramp": 0.3},
        "method": "sabr",
        "learning_rate": 0.005,
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (plain.setdefault(section, {}) if section else plain)[name] = value
    plain["train"]["epochs"] = max(plain["train"]["epochs"], len(STAGE_SHARES.get(plain["method"], ())))
    return plain


@pytest.fixture
def run_config() -> Any:
    """``run_config(train__epochs=3, ...)`` gives a RunConfig."""
    return lambda **changes: parse(RunConfig, run_dict(**changes))
