"""The gradient to the image through the first convolution, against torch's own."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, forward
from cactus_ray.bounds.interval import ball
from cactus_ray.bounds.trace import trace
from cactus_ray.models.normalize import Normalize
from cactus_ray.training import attacks
from cactus_ray.training.entrance import Entrance

KERNELS = [case for case in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2)) if case[2] < case[0]]


def network(channels: int, kernel: int, stride: int, padding: int, size: int = 9) -> nn.Module:
    torch.manual_seed(kernel)
    first = nn.Conv2d(channels, 5, kernel, stride=stride, padding=padding)
    factors = torch.tensor([-2.0, 2.5, 3.0][:channels])  # a negative one turns signs around
    normalise = Normalize(factors, torch.full((channels,), 0.1))
    body = nn.Sequential(normalise, first, nn.ReLU(), nn.Flatten())
    outputs = body(torch.zeros(1, channels, size, size)).shape[1]
    return nn.Sequential(*body, nn.Linear(outputs, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding"), KERNELS)
def test_gradient_is_that_of_torch(channels: int, kernel: int, stride: int, padding: int) -> None:
    graph, params = trace(network(channels, kernel, stride, padding).double(), (channels, 9, 9))
    entrance = Entrance.of(graph, params)
    if channels > 1 and stride == 1:
        assert entrance is None
        return
    assert entrance is not None
    x = torch.rand(4, channels, 9, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    (expected,) = torch.autograd.grad(F.cross_entropy(forward(graph, params, x), labels), x)
    leaf = entrance.forward(x.detach()).requires_grad_(True)
    (behind,) = torch.autograd.grad(F.cross_entropy(forward(entrance.rest, params, leaf), labels), leaf)
    torch.testing.assert_close(entrance.pull(behind), expected, rtol=1e-10, atol=1e-12)


def test_attack_finds_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, params = trace(network(1, 4, 2, 1).double(), (1, 9, 9))
    images, labels = torch.rand(6, 1, 9, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    region, start = ball(images, 0.1, (0.0, 1.0)), torch.rand(images.shape, dtype=torch.float64)

    def attacked() -> Tensor:
        return attacks.pgd(graph, params, labels, region, steps=4, step_size=0.03, start=start)

    fast = attacked()
    monkeypatch.setattr(Entrance, "of", lambda graph, params: None)
    torch.testing.assert_close(fast, attacked(), rtol=0, atol=1e-12)
    assert not torch.equal(fast, torch.lerp(region.lower, region.upper, start))


class Skips(nn.Module):
    """The image itself goes past the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 2, stride=2)
        self.beside = nn.AvgPool2d(2)
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.beside(x)).flatten(1))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)), (3, 8, 8)),
        (nn.Sequential(nn.Conv2d(8, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)), (8, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (1, 8, 8)),
        (Skips(), (1, 8, 8)),
    ],
    ids=["no stride", "many channels", "no convolution", "past it"],
)
def test_no_entrance(module: nn.Module, shape: tuple[int, ...]) -> None:
    graph: Graph
    graph, params = trace(module, shape)
    assert Entrance.of(graph, params) is None
