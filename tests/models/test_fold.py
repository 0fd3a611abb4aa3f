"""Folding batch norm keeps the function: float64, random statistics, sequential and residual networks."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ModelConfig
from cactus_ray.models import build, fold_batch_norm


def randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Float64, evaluation mode, batch norms away from the identity."""
    module = module.double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = layer.running_mean.shape
            layer.running_mean.copy_(torch.randn(shape, generator=generator))
            layer.running_var.copy_(torch.rand(shape, generator=generator) + 0.3)
            if layer.affine:
                with torch.no_grad():
                    layer.weight.copy_(torch.randn(shape, generator=generator))
                    layer.bias.copy_(torch.randn(shape, generator=generator))
    return module


def check(module: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Graph, Params]:
    """Fold and compare with the module itself; no batch norm and no tensor of one may be left."""
    graph, params = trace(randomize(module, generator), shape)
    before = {k: v.clone() for k, v in params.items()}
    folded, tensors = fold_batch_norm(graph, params)
    x = torch.rand(3, *shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        expected = module(x)
        difference = (forward(folded, tensors, x) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-10
    assert all(n.op != "batch_norm" for n in folded.nodes)
    assert not [k for k in tensors if "running" in k]
    assert all(v.dtype == torch.float64 for v in tensors.values())
    assert params.keys() == before.keys()
    assert all(torch.equal(params[k], before[k]) for k in before)
    return folded, tensors


@pytest.mark.parametrize("name", ["mlp", "cnn_small", "cnn7"])
def test_sequential_networks(name: str, generator: torch.Generator) -> None:
    config = ModelConfig(name=name, width=0.25, batch_norm=True)
    folded, params = check(build(config, (2, 8, 8), 5, generator=generator), (2, 8, 8), generator)
    layers = {n.name for n in folded.weighted()}
    assert {n.op for n in folded.nodes} <= {"input", "scale_shift", "conv2d", "linear", "relu", "flatten"}
    assert {k.split(".")[0] for k in params} == layers | ({"normalize"} if name == "cnn7" else set())
    assert all(f"{name}.bias" in params for name in layers)


def test_resnet18(generator: torch.Generator) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = torchvision.models.resnet18(weights=None, num_classes=10)
    folded, _ = check(module, (3, 32, 32), generator)
    ops = [n.op for n in folded.nodes]
    assert (ops.count("conv2d"), ops.count("linear"), ops.count("add")) == (20, 1, 8)
    assert "scale_shift" not in ops


class Shared(nn.Module):
    """A convolution read by a batch norm and by an addition; then a batch norm that stands behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.late = nn.BatchNorm2d(4, affine=False)
        self.flatten, self.fc = nn.Flatten(), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.relu(self.norm(x) + x)
        return self.fc(self.flatten(self.late(x)))  # type: ignore[no-any-return]


def test_what_cannot_be_merged_becomes_scale_shift(generator: torch.Generator) -> None:
    folded, params = check(Shared(), (2, 4, 4), generator)
    assert [n.name for n in folded.nodes if n.op == "scale_shift"] == ["norm", "late"]
    assert params["norm.scale"].shape == params["late.shift"].shape == (4,)


def test_chains_first_and_last(generator: torch.Generator) -> None:
    module = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
        nn.BatchNorm1d(3),
    )
    folded, _ = check(module, (2, 4, 4), generator)
    assert [n.op for n in folded.nodes] == ["input", "scale_shift", "conv2d", "relu", "flatten", "linear"]


def test_without_batch_norm_nothing_changes(generator: torch.Generator) -> None:
    graph, params = trace(build(ModelConfig(name="mlp"), (1, 4, 4), 3, generator=generator), (1, 4, 4))
    folded, tensors = fold_batch_norm(graph, params)
    assert folded == graph
    assert all(tensors[k] is params[k] for k in params)


def test_rounds_once_to_the_dtype_of_the_tensors(generator: torch.Generator) -> None:
    module = randomize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)), generator)
    graph, wide = trace(module, (2, 4, 4))
    single = {k: v.float() for k, v in wide.items()}
    _, expected = fold_batch_norm(graph, {k: v.double() for k, v in single.items()})
    _, folded = fold_batch_norm(graph, single)
    assert all(torch.equal(folded[k], expected[k].float()) for k in expected)
