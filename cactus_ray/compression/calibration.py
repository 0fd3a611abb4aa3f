"""What some levels measure on calibration images: batch-norm statistics and gradients of the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, apply_node, forward

BATCH = 250


@torch.no_grad()
def recalibrate(graph: Graph, params: Params, images: Tensor) -> Params:
    """``params`` with the running statistics of every batch norm measured on images [N, C, H, W] in one pass.

    Every batch norm sees its input as the recalibrated layers before it produce it, and stores mean and biased
    variance, so the network afterwards computes on these images exactly what it computed while they were measured.
    Deterministic.
    """
    consumers = graph.consumers()
    waiting = {name: len(nodes) for name, nodes in consumers.items()}
    values: dict[str, Tensor] = {}
    found = dict(params)
    for node in graph.nodes:
        inputs = [values[i] for i in node.inputs]
        statistics: Statistics = {}
        if node.op == "batch_norm":
            dims = [d for d in range(inputs[0].dim()) if d != 1]
            var, mean = torch.var_mean(inputs[0], dim=dims, correction=0)
            statistics[node.name] = (mean, var)
            found[f"{node.name}.running_mean"], found[f"{node.name}.running_var"] = mean, var
        values[node.name] = images if node.op == "input" else apply_node(node, params, inputs, statistics)
        for name in node.inputs:  # a thousand images times every activation would not fit: keep what is still read
            waiting[name] -= 1
            if waiting[name] == 0:
                values.pop(name, None)
    return found


def gradients(graph: Graph, params: Params, images: Tensor, labels: Tensor) -> Params:
    """Gradient of the mean cross-entropy over images [N, C, H, W], labels [N] for every conv and linear weight.

    Batch norm uses its running statistics. Deterministic; ``params`` are not changed.
    """
    names = [f"{node.name}.weight" for node in graph.weighted()]
    weights = {k: params[k].detach().clone().requires_grad_() for k in names}
    total = {k: torch.zeros_like(params[k]) for k in names}
    with torch.enable_grad():
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):  # type: ignore[no-untyped-call]
            loss = F.cross_entropy(forward(graph, {**params, **weights}, x), y, reduction="sum") / len(images)
            for k, g in zip(names, torch.autograd.grad(loss, [weights[k] for k in names]), strict=True):
                total[k] += g
    return total
