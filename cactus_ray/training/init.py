"""First weights for certified training."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from cactus_ray.bounds.graph import Graph, Params

_THROUGH = ("relu", "leaky_relu", "batch_norm", "scale_shift", "max_pool2d", "avg_pool2d", "flatten")


def ibp_initialization(graph: Graph, params: Params, generator: torch.Generator, keep: Collection[str] = ()) -> Params:
    """Weights from N(0, 2 pi / fan_in^2), so that interval widths neither grow nor vanish (Shi et al. 2021, Sec. 4.2).

    All convolutions and linear layers but the last; biases and batch norm stay. A layer that reads a residual sum has
    half the deviation, because the widths of both branches add up. ``generator``: on the CPU. ``keep``: names of
    weights that stay, too.
    """
    found = dict(params)
    for node in graph.weighted()[:-1]:
        name = f"{node.name}.weight"
        if name in keep:
            continue
        weight = params[name]
        deviation = math.sqrt(2 * math.pi) / weight[0].numel()
        if _reads_sum(graph, node.inputs[0]):
            deviation /= 2
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        found[name] = (deviation * noise).to(weight)
    return found


def _reads_sum(graph: Graph, name: str) -> bool:
    node = graph[name]
    while node.op in _THROUGH:
        node = graph[node.inputs[0]]
    return node.op == "add"
