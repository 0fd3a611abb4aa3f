"""Traced graphs compute what their modules compute; anything that is not understood is refused by name."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import KINDS, SHAPE
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, forward
from cactus_ray.bounds.trace import trace
from cactus_ray.errors import UnsupportedGraphError


class Function(nn.Module):
    """A forward given as a function of x, with two layers that it may use."""

    def __init__(self, function: Callable[["Function", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.LazyLinear(3)
        self.function = function
        self.free = nn.Parameter(torch.ones(1))
        self(torch.zeros(1, *SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_module_computes(kind: str) -> None:
    module = KINDS[kind]()
    with torch.no_grad():
        module.train()(torch.rand(8, *SHAPE))  # batch norm has seen something
    graph, params = trace(module, SHAPE)
    assert module.training
    images = torch.rand(3, *SHAPE)
    torch.testing.assert_close(forward(graph, params, images), module.eval()(images))
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    torch.testing.assert_close(forward(again, params, images), module(images))
    assert again == graph


FUNCTIONAL: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "view": lambda m, x: m.head(F.relu(m.conv(x)).view(x.size(0), -1)),
    "reshape by shape": lambda m, x: m.head(m.conv(x).relu().reshape(x.shape[0], -1)),
    "max pool": lambda m, x: m.head(F.max_pool2d(m.conv(x), 3, 2, 1).flatten(1)),
    "average pool without the padding": lambda m, x: m.head(
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False).flatten(1)
    ),
    "average pool by position": lambda m, x: m.head(F.avg_pool2d(x, 3, 2, 1, False, False).flatten(1)),
    "adaptive pool": lambda m, x: m.head(torch.flatten(F.adaptive_avg_pool2d(x, (3, 2)), 1)),
    "leaky ReLUs": lambda m, x: m.head(F.leaky_relu(F.leaky_relu(m.conv(x), 0.3), negative_slope=0.2).flatten(1)),
    "leaky ReLU in place": lambda m, x: m.head(F.leaky_relu_(m.conv(x)).flatten(1)),
    "sum in place": lambda m, x: m.head((m.conv(x).add_(x)).flatten(start_dim=1)),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_forms(name: str) -> None:
    module = Function(FUNCTIONAL[name])
    graph, params = trace(module, SHAPE)
    images = torch.rand(3, *SHAPE)
    torch.testing.assert_close(forward(graph, params, images), module(images))


REFUSED: dict[str, tuple[Callable[[Function, Tensor], Tensor], str]] = {
    "sigmoid": (lambda m, x: m.head(torch.sigmoid(x).flatten(1)), "sigmoid"),
    "a product": (lambda m, x: m.head((2 * x).flatten(1)), "mul"),
    "a constant": (lambda m, x: m.head((x + 1.0).flatten(1)), "1.0"),
    "a free tensor": (lambda m, x: m.head((x + m.free).flatten(1)), "free"),
    "a scaled sum": (lambda m, x: m.head(torch.add(x, m.conv(x), alpha=2).flatten(1)), "alpha"),
    "ceil mode by position": (lambda m, x: m.head(F.max_pool2d(x, 4, 4, 0, 1, True).flatten(1)), "ceil_mode"),
    "a shared layer": (lambda m, x: m.head(m.conv(m.conv(x)).flatten(1)), "used twice"),
    "values of tensors": (lambda m, x: m.head(x.flatten(1)) if x.sum() > 0 else x, "values of tensors"),
    "training": (lambda m, x: m.head(m.conv(x).flatten(1)) if m.training else m.head(x.flatten(1)), "self.training"),
    "an earlier output": (lambda m, x: (m.head(x.flatten(1)), m.conv(x))[0], "exactly one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_functions_are_named(name: str) -> None:
    function, word = REFUSED[name]
    with pytest.raises(UnsupportedGraphError, match=word):
        trace(Function(function), SHAPE)


class WrongScale(nn.Module):
    """Claims to be a scale and shift, but is not."""

    is_scale_shift = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * x


MODULES = {
    "LSTM": nn.LSTM(6, 3),
    "GELU": nn.GELU(),
    "padding must be zeros": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    "ceil_mode": nn.MaxPool2d(4, ceil_mode=True),
    "divisor_override": nn.AvgPool2d(2, divisor_override=3),
    "must divide": nn.AdaptiveAvgPool2d(4),
    "slope = 1.5": nn.LeakyReLU(1.5),
    "slope = -0.1": nn.LeakyReLU(-0.1),
    "running statistics": nn.BatchNorm2d(2, track_running_stats=False),
    "start_dim": nn.Flatten(2),
    "something else": WrongScale(),
}


@pytest.mark.parametrize("word", MODULES)
def test_refused_modules_are_named(word: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=word):
        trace(nn.Sequential(MODULES[word]), SHAPE)


def test_an_unknown_operator_in_json_is_named() -> None:
    graph, _ = trace(KINDS["mlp"](), SHAPE)
    data = graph.to_json()
    data["nodes"][1][1] = "softmax"
    with pytest.raises(UnsupportedGraphError, match="softmax"):
        Graph.from_json(data)
