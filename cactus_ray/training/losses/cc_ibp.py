"""CC-IBP: cross-entropy of a convex combination of margins (De Palma et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics
from cactus_ray.training.losses.base import LossOptions, Region, Visitor, worst_case
from cactus_ray.training.losses.expressive import adversarial_logits_and_bounds


def cc_ibp(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``CE(-(alpha * lower + (1 - alpha) * adversarial))`` with alpha = ibp_weight (De Palma et al. 2024, CC-IBP).

    ``lower`` are the interval bounds of the margins over the ball, ``adversarial`` the margins at the points, both of
    ``logit[label] - logit[j]``: from the adversarial loss (alpha 0) to that of interval bounds (alpha 1).
    """
    logits, lower = adversarial_logits_and_bounds(graph, params, region, statistics, visit)
    adversarial = logits.gather(1, region.labels[:, None]) - logits
    return worst_case(options.ibp_weight * lower + (1.0 - options.ibp_weight) * adversarial, region.labels)
