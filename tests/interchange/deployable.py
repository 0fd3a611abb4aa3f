"""Small networks as they are deployed, and the levels at which the file is tried."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.compression.levels import FORMATS, INTEGER_BITS, parse_level
from cactus_ray.compression.materialize import Compressed, materialize
from cactus_ray.interchange.write import FileInfo
from cactus_ray.models.normalize import Normalize

INFO = FileInfo("digits", ("zero", "one", "zwei \u00e4"), (0.0, 1.0))
SHAPE = (1, 8, 8)
SOME_FORMATS = (
    "fp16", "bf16", *INTEGER_BITS, "int8:affine", "int4:tensor:affine", "int2:affine", "codebook:8", "codebook:3",
)  # fmt: skip
LEVELS = (
    "dense",
    *FORMATS,
    *(f"prune:gu-l1:{s}{f}" for s in (0.5, 0.9, 0.97) for f in ("", "+fp16", "+int8", "+int3")),
    *(f"prune:gu-l1:0.9+{f}" for f in SOME_FORMATS if f not in ("fp16", "int8", "int3")),
    "prune:lu-l2:0.8+int6",
    "prune:gs-l2:0.5+rebn+int8",
    "prune:ls-l1:0.5",
    *(f"lr+sparse:{k}" for k in (0.001, 0.1, 0.5, 1)),
    *(f"lr+sparse:{k}+{f}" for k in (0.05, 0.3) for f in ("int8", "int3", "ternary:tensor", "codebook:4")),
    "lr+sparse:0.1+rebn+int6",
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.pool(torch.relu(self.norm(x + self.block(x)))).flatten(1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 37), nn.ReLU(), nn.Linear(37, 20, bias=False), nn.ReLU(), nn.Linear(20, 3)
    ),
    "cnn_small": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        Normalize.standard((0.4,), (0.3,)),
        nn.Conv2d(1, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, padding=1, groups=5),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, 1, 1),
        nn.Flatten(),
        nn.BatchNorm1d(5 * 5 * 3),
        nn.Linear(5 * 5 * 3, 3),
    ),
    "residual": Residual,
    "leaky": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.25), nn.Flatten(), nn.Linear(64, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)
    ),
}


def network(kind: str, seed: int = 0) -> tuple[Graph, Params]:
    graph, params = trace(KINDS[kind](), SHAPE)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in params.items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            values = values.abs() + 0.3
        elif tensor.dim() > 1:
            values = values / tensor[0].numel() ** 0.5
        params[name] = values
    return graph, params


def images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def compressed(kind: str, level: str, seed: int = 0) -> Compressed:
    return materialize(*network(kind, seed), parse_level(level), (images(50), torch.arange(50) % 3))
