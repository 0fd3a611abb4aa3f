"""How the members of the compression set are pruned in one step (CACTUS, Sec. 4.3 and Tables 6-8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.config import CompressionSetConfig

_ENERGY = (0.01, 0.05, 0.10)  # adaptive: shares of the squared weight that its members remove
_SAMPLE = 1_000_000  # adaptive: weights looked at; the quantiles of more would cost more than the step
_LARGEST = 1.0 - 1e-6


def draw(
    config: CompressionSetConfig, progress: float, generator: torch.Generator, graph: Graph, params: Params
) -> tuple[float, ...]:
    """Sparsities in [0, 1) of the members beside the full network.

    ``progress`` in [0, 1] is the share of training that is done; ``generator`` (CPU) is used by the random strategies.

    none: no member; single, triple: 1 or 3 from U(low, high); random: ``size - 1`` of them; fixed: ``size - 1`` evenly
    spaced from low to high (the paper's .25, .5, .75 is size 4); dense: 5 evenly spaced; progressive: one that rises
    linearly from low to high; adaptive: those that remove 1, 5 and 10 % of the squared weight of all convolutions and
    linear layers, whatever low and high are.
    """
    match config.strategy:
        case "none":
            return ()
        case "single":
            return _uniform(config, 1, generator)
        case "triple":
            return _uniform(config, 3, generator)
        case "random":
            return _uniform(config, config.size - 1, generator)
        case "fixed":
            return _spaced(config, config.size - 1)
        case "dense":
            return _spaced(config, 5)
        case "progressive":
            return (config.low + (config.high - config.low) * progress,)
        case "adaptive":
            return _adaptive(graph, params)
    raise ValueError(f"strategy {config.strategy!r}")


def prunings(
    config: CompressionSetConfig, sparsities: Sequence[float], generator: torch.Generator
) -> list[tuple[str, float]]:
    """Family and sparsity by which each pruned member is made from the current weights.

    With ``channels`` every second member loses that share of its channels at sparsity ``high``, and in proportion less
    below, by the structured family of the same scope: ranked by l2 norm, or by gradients where ``family`` is.
    ``generator`` (CPU) draws where the turns begin, so that a single member loses channels half of the time. Masks of
    single weights hardly prepare a network for the loss of channels, nor do those of channels of another rank.
    """
    if config.channels is None:
        return [(config.family, sparsity) for sparsity in sparsities]
    structured = f"{config.family[0]}s-{'grad' if config.family.endswith('-grad') else 'l2'}"
    begin = int(torch.randint(2, (), generator=generator))
    made = []
    for turn, sparsity in enumerate(sparsities, begin):
        share = config.channels * (sparsity / config.high if sparsity < config.high else 1.0)  # high may be 0
        made.append((structured, share) if turn % 2 else (config.family, sparsity))
    return made


def members(config: CompressionSetConfig) -> int:
    """How many members the set has, the full network included."""
    drawn = {"none": 0, "single": 1, "triple": 3, "dense": 5, "progressive": 1, "adaptive": len(_ENERGY)}
    return 1 + drawn.get(config.strategy, config.size - 1)


def _uniform(config: CompressionSetConfig, count: int, generator: torch.Generator) -> tuple[float, ...]:
    draws: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return tuple(config.low + (config.high - config.low) * u for u in draws)


def _spaced(config: CompressionSetConfig, count: int) -> tuple[float, ...]:
    if count == 1:
        return ((config.low + config.high) / 2,)
    width = (config.high - config.low) / (count - 1)
    return tuple(config.low + i * width for i in range(count))


def _adaptive(graph: Graph, params: Params) -> tuple[float, ...]:
    with torch.no_grad():
        weights = torch.cat([params[f"{n.name}.weight"].detach().flatten() for n in graph.weighted()])
        weights = weights[:: -(-weights.numel() // _SAMPLE)]
        energy = weights.square().sort().values.double().cumsum(0)
        limits = energy[-1] * torch.tensor(_ENERGY, dtype=energy.dtype, device=energy.device)
        # The host waits for the device here: masks cut at a rank, which is a number on the host. It does so once in
        # refresh_every steps.
        counts: list[int] = torch.searchsorted(energy, limits, right=True).tolist()
    return tuple(min(count / weights.numel(), _LARGEST) for count in counts)
