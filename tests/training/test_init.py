import math

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node
from cactus_ray.training.init import ibp_initialization


def test_deviation_by_fan_in_all_but_the_last_layer(generator: torch.Generator) -> None:
    conv = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    nodes = (
        Node("input", "input"),
        Node("conv1", "conv2d", ("input",), conv),
        Node("conv2", "conv2d", ("conv1",), conv),
        Node("sum", "add", ("conv1", "conv2")),
        Node("relu", "relu", ("sum",)),
        Node("conv3", "conv2d", ("relu",), conv),
        Node("flatten", "flatten", ("conv3",)),
        Node("fc", "linear", ("flatten",)),
    )
    params = {f"conv{i}.weight": torch.zeros(64, c, 3, 3) for i, c in ((1, 8), (2, 64), (3, 64))}
    params |= {"conv1.bias": torch.full((64,), 0.3), "fc.weight": torch.ones(2, 64 * 16)}
    found = ibp_initialization(Graph(nodes, (8, 4, 4)), params, generator)
    for name, fan_in, share in (("conv1", 8 * 9, 1.0), ("conv2", 64 * 9, 1.0), ("conv3", 64 * 9, 0.5)):
        wanted = share * math.sqrt(2 * math.pi) / fan_in
        assert found[f"{name}.weight"].std().item() == pytest.approx(wanted, rel=0.05)
        assert abs(found[f"{name}.weight"].mean().item()) < 0.05 * wanted
    assert torch.equal(found["fc.weight"], params["fc.weight"])
    assert torch.equal(found["conv1.bias"], params["conv1.bias"])
    assert not params["conv1.weight"].any()  # the given tensors are left alone
