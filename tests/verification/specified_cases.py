"""Random specifications over many inputs whose exact answer is known and close: near the edge of the unsafe set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from oracle import Array, unroll
from oracle_forms import excess, smallest_excess
from specified import Network, runtime, specification
from torch import Tensor, nn

from cactus_ray.bounds.trace import trace
from cactus_ray.verification.decide import Answer, decide
from cactus_ray.verification.vnnlib import parse_vnnlib

SHAPE = (1, 9, 9)
"""81 inputs, all of them free."""
OUTPUTS = 4


class Residual(nn.Module):
    """A strided convolution and a block with an identity branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, stride=3)
        self.again = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(9, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.again(x) + x).flatten(1))


KINDS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(81, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, OUTPUTS)
        ),
        0.06,
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 1, 3, stride=3), nn.ReLU(), nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, OUTPUTS)
        ),
        0.2,
    ),
    "residual": (Residual, 0.2),
}
"""Networks, and the radius of their boxes."""


@dataclass(frozen=True)
class Stated:
    """A specification; ``low``, ``high``: the bracket of how far the box is from the unsafe set, below 0 inside it."""

    network: Network
    text: str
    low: float
    high: float


def random_network(kind: str, seed: int) -> Network:
    graph, params = trace(KINDS[kind][0](), SHAPE)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in params.items():
        noise = torch.randn(tensor.shape, generator=generator)
        found[name] = (1.5 * noise / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 0.3 * noise).double()
    return graph, found


def stated(number: int) -> Stated:
    """Case ``number``: even ones are safe, odd ones are not; by at most a tenth of what the outputs move."""
    kind = list(KINDS)[number % len(KINDS)]
    network, random = random_network(kind, number), np.random.default_rng(number)
    program, radius = unroll(*network), KINDS[kind][1]
    center = random.random(81).round(3)
    lower, upper = (center - radius).round(6), (center + radius).round(6)
    disjuncts = []
    for _ in range(random.integers(1, 4)):
        rows = random.normal(size=(random.integers(1, 4), OUTPUTS)).round(1)
        rows[:, random.integers(0, OUTPUTS)] = 0.0
        shifts = random.random(len(rows)).round(2)
        disjuncts.append((rows, np.array([excess(program, center, r[None], np.zeros(1)) for r in rows]) - shifts))
    found = [smallest_excess(program, lower, upper, rows, bounds) for rows, bounds in disjuncts]
    low, high = min(f.low for f in found), min(f.high for f in found)
    move = round((low + high) / 2 + (-1 if number % 2 == 0 else 1) * random.uniform(0.005, 0.1), 6)
    disjuncts = [(rows, (bounds + move).round(6)) for rows, bounds in disjuncts]
    text = specification(list(zip(lower.tolist(), upper.tolist(), strict=True)), OUTPUTS, _unsafe(disjuncts))
    return Stated(network, text, low - move - 1e-5, high - move + 1e-5)


def _unsafe(disjuncts: list[tuple[Array, Array]]) -> str:
    clauses = []
    for rows, bounds in disjuncts:
        sums = [" ".join(f"(* {c!r} Y_{j})" for j, c in enumerate(row.tolist())) for row in rows]
        forms = [f"(<= (+ {s}) {b!r})" for s, b in zip(sums, bounds.tolist(), strict=True)]
        clauses.append(f"(and {' '.join(forms)})")
    return f"(or {' '.join(clauses)})"


def answer(case: Stated) -> Answer:
    """The answer without a limit of time: the edge is near, but not so near that splitting would not end."""
    graph, params = case.network
    order = torch.arange(int(np.prod(graph.input_shape)))
    return decide(graph, params, parse_vnnlib(case.text), order, runtime(case.network), timeout=math.inf)
