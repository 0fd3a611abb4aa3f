"""Adversarial training (Madry et al. 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward
from cactus_ray.training.losses.base import LossOptions, Region, Visitor


def pgd(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """Cross-entropy at the adversarial points (Madry et al. 2018, Eq. 2). No bound; nothing is visited.

    Batch norm as in CTBench: the clean batch's statistics, with which the points were also found.
    Measured once against CTBench in float64, same points: within 1e-14.
    """
    logits = forward(graph, params, region.attacked("pgd"), statistics=statistics)
    return F.cross_entropy(logits, region.labels)
