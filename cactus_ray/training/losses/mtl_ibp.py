"""MTL-IBP: adversarial and interval loss side by side (De Palma et al. 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics
from cactus_ray.training.losses.base import LossOptions, Region, Visitor, worst_case
from cactus_ray.training.losses.expressive import adversarial_logits_and_bounds


def mtl_ibp(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``alpha * L_IBP + (1 - alpha) * L_adv`` with alpha = ibp_weight (De Palma et al. 2024, MTL-IBP).

    ``L_IBP`` is the cross-entropy of the interval bounds over the ball, ``L_adv`` that of the logits at the points.
    """
    logits, lower = adversarial_logits_and_bounds(graph, params, region, statistics, visit)
    adversarial = F.cross_entropy(logits, region.labels)
    return options.ibp_weight * worst_case(lower, region.labels) + (1.0 - options.ibp_weight) * adversarial
