"""The cheap score of an epoch: plain and IBP-certified accuracy of the full network on the selection split."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import ball, margins
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.size import ideal_bits
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import ConfigError, UnsupportedGraphError, UserError
from cactus_ray.training.workers import Workers

_BATCH = 512


def proxy_accuracies(
    graph: Graph, params: Params, images: Tensor, labels: Tensor, threat: ThreatConfig, workers: Workers
) -> tuple[float, float]:
    """Standard and IBP-certified accuracy in [0, 1] with running statistics; the same numbers on every worker.

    The certified one is a float32 proxy for choosing, never a certificate. Each worker scores its share.
    """
    hits = torch.zeros(2, dtype=torch.float64, device=images.device)
    mine_images, mine_labels = images[workers.rank :: workers.size], labels[workers.rank :: workers.size]
    with torch.no_grad():
        for x, y in zip(torch.split(mine_images, _BATCH), torch.split(mine_labels, _BATCH), strict=True):
            right = forward(graph, params, x).argmax(1) == y
            lower = margins(graph, params, ball(x, threat.epsilon, threat.domain), y)
            others = torch.ones_like(lower, dtype=torch.bool).scatter(1, y[:, None], False)
            certified = ((lower > 0) | ~others).all(1)  # a NaN is not greater than 0
            hits += torch.stack([right.sum(), certified.sum()])
    workers.mean_([hits])
    standard, certified_accuracy = (hits * workers.size / len(labels)).tolist()
    return standard, certified_accuracy


def level_scores(
    graph: Graph, params: Params, level: str, selection: tuple[Tensor, Tensor], threat: ThreatConfig, *,
    workers: Workers, calibration: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """``proxy_accuracies`` and ``ideal_bits`` of the network that would be deployed at a level.

    NaN where the level does not fit the network.
    """
    images, labels = selection
    try:
        compressed = materialize(graph, params, parse_level(level), calibration, threat.domain)
    except (UnsupportedGraphError, ConfigError):  # the level itself, whatever the weights
        raise
    except UserError:  # weights that overflow the level's format: the same on every worker
        return math.nan, math.nan, math.nan
    tensors = {name: tensor.to(images.device) for name, tensor in compressed.params.items()}
    return *proxy_accuracies(compressed.graph, tensors, images, labels, threat, workers), float(ideal_bits(compressed))


def evenly_spaced(total: int, count: int) -> Tensor:
    """At most ``count`` indices below ``total``, spread evenly over it."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()
