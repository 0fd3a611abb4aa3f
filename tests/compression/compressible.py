"""Small random networks whose channels hang together in every way that structured pruning must respect."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.models.normalize import Normalize

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """A projection shortcut, an identity shortcut, and a batch norm before the ReLU of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 4, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(6, 4, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.hidden = nn.Linear(4 * 9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.outer(torch.relu(self.inner(x))) + self.shortcut(x)))
        x = torch.relu(self.again(x) + x)
        return self.head(torch.relu(self.hidden(self.pool(x).flatten(1))))


class FlatSum(nn.Module):
    """A flattened map meets a linear layer of as many features: these channels cannot be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=2)
        self.side = nn.Linear(72, 27)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(27, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.flatten(self.conv(x)) + self.side(self.flatten(x)))
        return self.head(torch.relu(self.hidden(x)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    ),
    "leaky": lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.LeakyReLU(0.05),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.LeakyReLU(),
        nn.Linear(7, 3),
    ),
    "cnn": lambda: nn.Sequential(
        Normalize.standard((0.3, 0.5), (0.5, 0.25)),
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(24),
        nn.Linear(24, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 3),
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, groups=5, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    ),
    "residual": Residual,
    "flat sum": FlatSum,
}


def network(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Graph, Params]:
    """A network with random weights, affine parameters and running statistics."""
    graph, params = trace(KINDS[kind](), SHAPE)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in params.items():
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            values = values.abs() + 0.3
        elif tensor.dim() > 1:
            values = values / tensor[0].numel() ** 0.5
        params[name] = values.to(dtype)
    return graph, params


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
