"""Small random networks of every kind that the bounds understand, in float64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.models.normalize import Normalize

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """Two branches, one of them a strided convolution, added; then a block with an identity branch."""

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.short = nn.Conv2d(4, 4, 1, stride=2)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.left(x)) + self.short(x))
        x = torch.relu(self.again(x) + x)
        return self.head(x.flatten(1))


def _conv(**options: object) -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, **options)  # type: ignore[arg-type]
    side = conv(torch.zeros(1, *SHAPE)).shape[-2:]
    second = nn.Conv2d(4, 4, 2, stride=1, padding=1)
    return nn.Sequential(
        conv, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(4 * (side[0] + 1) * (side[1] + 1), 3)
    )


def _pooled(pool: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        pool,
        nn.Conv2d(4, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 3),
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "conv": lambda: _conv(),
    "stride": lambda: _conv(stride=2),
    "stride and padding": lambda: _conv(stride=(2, 3), padding=(1, 2)),
    "dilation": lambda: _conv(dilation=2, padding=1),
    "groups": lambda: _conv(groups=2, padding=1),
    "all options": lambda: _conv(stride=2, padding=2, dilation=(1, 2), groups=2, bias=False),
    "deep conv": lambda: nn.Sequential(
        Normalize.standard((0.3, 0.5), (0.5, 0.25)),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    "conv on conv": lambda: nn.Sequential(  # no ReLU between: a window reaches over the border of the middle map
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 3),
        nn.BatchNorm1d(3),
    ),
    "max pool": lambda: _pooled(nn.MaxPool2d(2), 12),
    "overlapping max pool": lambda: _pooled(nn.MaxPool2d(3, stride=2, padding=1), 12),
    "average pool": lambda: _pooled(nn.AvgPool2d(2), 12),
    "padded average pool": lambda: _pooled(nn.AvgPool2d(3, stride=2, padding=1), 12),
    "uncounted padding": lambda: _pooled(nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), 12),
    "residual": lambda: Residual(),
    "leaky": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.LeakyReLU(0.7),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.LeakyReLU(1.0),
        nn.Linear(8, 8),
        nn.LeakyReLU(0.0),
        nn.Linear(8, 3),
    ),
    "ReLU last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()),
}


def network(kind: str, seed: int, gain: float = 1.5) -> tuple[Graph, Params]:
    """A network with random weights, biases and batch-norm statistics (weights scaled by ``gain``)."""
    graph, params = trace(KINDS[kind](), SHAPE)
    return graph, randomize(params, seed, gain)


def randomize(params: Params, seed: int, gain: float = 1.5) -> Params:
    """New float64 values for all tensors but the input normalisation's."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in params.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("scale", "shift")):
            found[name] = tensor.double()
        elif name.endswith("running_var"):
            found[name] = noise.abs() + 0.2
        elif name.endswith("weight") and tensor.dim() > 1:
            found[name] = gain * noise / tensor[0].numel() ** 0.5
        else:
            found[name] = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
    return found
