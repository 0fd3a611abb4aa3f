"""What makes training passes cheap changes no function and no gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, forward, moments
from cactus_ray.bounds.interval import Box, ball, propagate
from cactus_ray.bounds.trace import trace
from cactus_ray.training.layout import channels_last, merged


class Network(nn.Module):
    """A batch norm behind a convolution that only it reads, one behind a sum, one behind a convolution read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bn3, self.relu, self.out = nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        return self.out(self.relu(self.bn3(self.bn2(y) + y)).flatten(1))


@pytest.fixture
def network() -> tuple[Graph, Params]:
    torch.manual_seed(0)
    graph, params = trace(Network().double(), (1, 6, 6))
    return graph, {k: v.requires_grad_("running" not in k) for k, v in params.items()}


def leaves(params: Params) -> list[Tensor]:
    return [v for v in params.values() if v.requires_grad]


@pytest.mark.parametrize("own", [True, False], ids=["statistics of the batch", "running statistics"])
def test_merged_is_the_same_function_with_the_same_gradients(network: tuple[Graph, Params], own: bool) -> None:
    graph, params = network
    images = torch.rand(5, 1, 6, 6, dtype=torch.float64)

    def boxes(use: bool) -> tuple[dict[str, Box], tuple[Tensor, ...]]:
        statistics: Statistics | None = None
        if own:
            statistics = {}
            forward(graph, params, images, collect=statistics)
        found: dict[str, Box] = {}
        chosen = merged(graph, channels_last(params), statistics) if use else (graph, params)
        out = propagate(
            *chosen, ball(images, 0.05, (0.0, 1.0)), statistics=statistics,
            visit=lambda node, box: found.__setitem__(node.name, box),
        )  # fmt: skip
        return found, torch.autograd.grad((out.center.square() + out.radius).sum(), leaves(params))

    (plain, expected), (faster, gradients) = boxes(False), boxes(True)
    assert plain.keys() - faster.keys() == {"conv1"}  # conv2 is read twice
    for name, box in faster.items():
        torch.testing.assert_close((box.center, box.radius), (plain[name].center, plain[name].radius))
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def test_channels_last_also_with_one_channel(network: tuple[Graph, Params]) -> None:
    graph, params = network
    params = {name: tensor.detach().float() for name, tensor in params.items()}
    laid = channels_last(params)
    assert laid["conv1.weight"].stride() == (9, 1, 3, 1)
    images = torch.rand(2, 1, 6, 6)
    found: dict[str, Tensor] = {}
    forward(graph, laid, images, visit=lambda node, y: found.__setitem__(node.name, y))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found.values() if y.shape[1:2] == (4,))
    for name, tensor in params.items():
        assert torch.equal(laid[name], tensor)


def test_in_place_changes_no_number(network: tuple[Graph, Params]) -> None:
    graph, params = network
    images, labels = torch.rand(4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def loss_and_gradients(in_place: bool) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(forward(graph, params, images, collect={}, in_place=in_place), labels)
        return loss, *torch.autograd.grad(loss, leaves(params))

    for found, expected in zip(loss_and_gradients(True), loss_and_gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4, 2)])
def test_moments_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    torch.testing.assert_close(moments(x), (mean, var))
    assert torch.autograd.gradcheck(moments, x)


def test_relu_of_a_box_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends go to ends, and so do their gradients, also where the batch is cut."""
    monkeypatch.setattr(interval, "_SLICE", 30)
    generator = torch.Generator().manual_seed(0)
    center, radius, *weights = (torch.randn(7, 3, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    center.requires_grad_()
    radius = radius.abs().requires_grad_()

    def value(box: Box) -> Tensor:
        return (weights[0] * box.center + weights[1] * box.radius).sum()

    found = interval.step(Node("y", "relu", ("x",)), {}, [Box(center, radius)])
    expected = Box.between((center - radius).relu(), (center + radius).relu())
    assert torch.equal(found.lower, expected.lower)
    assert torch.equal(found.upper, expected.upper)
    gradients = [torch.autograd.grad(value(box), (center, radius)) for box in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


class Strided(nn.Module):
    """A block with the shortcut of a residual network: a strided convolution of one pixel, of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.short = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 8, 1, stride=2)
        self.out = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.out(self.relu(self.conv2(x) + self.short(x)).flatten(1))


def test_gradients_through_strided_kernels_of_one_pixel_are_right() -> None:
    torch.manual_seed(0)
    graph, params = trace(Strided(), (1, 8, 8))
    images = torch.rand(32, 1, 8, 8)

    def gradients(of: Params, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(graph, of, x).square().sum(), leaves(of))

    params = {k: v.requires_grad_() for k, v in params.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in params.items()}
    expected = gradients(exact, images.double())
    found = torch.autograd.grad(forward(graph, channels_last(params), images).square().sum(), leaves(params))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
