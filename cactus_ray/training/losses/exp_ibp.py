"""Exp-IBP: geometric mean of adversarial and interval loss (De Palma et al. 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics
from cactus_ray.training.losses.base import LossOptions, Region, Visitor, worst_case
from cactus_ray.training.losses.expressive import adversarial_logits_and_bounds

_LEAST = 1e-12  # a loss that rounds to 0 has no finite gradient under a power below 1


def exp_ibp(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``L_IBP ** alpha * L_adv ** (1 - alpha)`` with alpha = ibp_weight (De Palma et al. 2024, Exp-IBP).

    ``L_IBP`` is the cross-entropy of the interval bounds over the ball, ``L_adv`` that of the logits at the points: of
    the two means over the batch, as the authors' code takes it.
    """
    logits, lower = adversarial_logits_and_bounds(graph, params, region, statistics, visit)
    adversarial = F.cross_entropy(logits, region.labels).clamp(min=_LEAST)
    bound = worst_case(lower, region.labels).clamp(min=_LEAST)
    return bound.pow(options.ibp_weight) * adversarial.pow(1.0 - options.ibp_weight)
