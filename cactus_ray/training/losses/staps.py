"""STAPS: TAPS over SABR's small box (Mao et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics
from cactus_ray.training.attacks import small_box
from cactus_ray.training.losses.base import LossOptions, Region, Visitor
from cactus_ray.training.losses.taps import attacked_tail


def staps(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``L_TAPS * L_IBP``, both over the small box of SABR (Mao et al. 2023; box: Mueller et al. 2023, Eq. 5).

    The formula is that of ``taps``. No bound of the loss over the ball.
    """
    box = small_box(region.ball, region.attacked("staps"), options.box_ratio)
    return attacked_tail(graph, params, box, region, options, statistics=statistics, visit=visit)
