"""What MTL-IBP, CC-IBP and Exp-IBP are made of (De Palma et al. 2024, arXiv 2305.13991).

Each runs from an adversarial loss (``ibp_weight`` 0) to the loss of interval bounds (``ibp_weight`` 1). The attack may
search a larger ball than the one that is bounded. Measured once against CTBench in float64, with batch norm set by
the adversarial batch there, too, same points: losses within 1e-14, gradients within 1e-13.
"""

from __future__ import annotations

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward
from cactus_ray.training.losses.base import Region, Visitor, box_margins


def adversarial_logits_and_bounds(
    graph: Graph,
    params: Params,
    region: Region,
    statistics: Statistics | None,
    visit: Visitor | None,
) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] at the adversarial points, and lower bounds [N, classes] of the margins over the ball.

    In training, batch norm takes the statistics of the adversarial batch, for the points and for the ball: so do the
    authors, whose bounds read the statistics of the last forward pass.
    """
    logits = forward(graph, params, region.attacked("an expressive loss"), collect=statistics, in_place=True)
    return logits, box_margins(graph, params, region.ball, region.labels, 1.0, statistics=statistics, visit=visit)
