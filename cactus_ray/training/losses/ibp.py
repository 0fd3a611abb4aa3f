"""Interval bound propagation (Gowal et al. 2018), with initialisation and regularisers elsewhere (Shi et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics
from cactus_ray.training.losses.base import LossOptions, Region, Visitor, box_margins, worst_case


def ibp(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """Interval bounds over the whole ball (Gowal et al. 2018, Sec. 3; Shi et al. 2021): an upper bound of the loss.

    Measured once against CTBench in float64, same weights and boxes: loss within 1e-14, gradients within 1e-13.
    """
    lower = box_margins(graph, params, region.ball, region.labels, 1.0, statistics=statistics, visit=visit)
    return worst_case(lower, region.labels)
