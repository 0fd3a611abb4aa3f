"""TAPS: intervals up to a split, an attack behind it (Mao et al. 2023, arXiv 2305.04574)."""

from __future__ import annotations

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics
from cactus_ray.bounds.interval import Box
from cactus_ray.training.losses.base import LossOptions, Region, Visitor, box_margins, worst_case
from cactus_ray.training.losses.tail import Aim, attacked_margins, lowest, tail_of


def taps(
    graph: Graph,
    params: Params,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """``L_TAPS * L_IBP`` over the ball (Mao et al. 2023); the gradient of L_TAPS times gradient_scale.

    ``L_IBP = CE(-lower)`` with the interval bounds of all margins, and ``L_TAPS = CE(-found)`` with ``found[j]`` the
    smallest ``logit[label] - logit[j]`` that an attack finds over the interval box in front of the last ``tail_layers``
    layers, one attack per class. No margin lies below its interval bound, so L_TAPS <= L_IBP. No bound. The gradient is
    ``L_TAPS * grad L_IBP + gradient_scale * L_IBP * grad L_TAPS``.
    Measured once against CTBench in float64, same latent points, TAPS and STAPS: loss within 1e-13, gradients 3e-7 of
    the largest (points in the middle of the box fall to either side of the connector's edge).
    """
    return attacked_tail(graph, params, region.ball, region, options, statistics=statistics, visit=visit)


def attacked_tail(
    graph: Graph,
    params: Params,
    box: Box,
    region: Region,
    options: LossOptions,
    *,
    statistics: Statistics | None,
    visit: Visitor | None,
) -> Tensor:
    """The loss of TAPS over any box."""
    if region.generator is None:
        raise ValueError("taps and staps need region.generator")
    tail = tail_of(graph, options.tail_layers)
    front: dict[str, Box] = {}

    def keep(node: Node, box: Box) -> None:
        if node.name == tail.nodes[0].name:
            front["box"] = box
        if visit is not None:
            visit(node, box)

    lower = box_margins(graph, params, box, region.labels, options.relu_shrinkage, statistics=statistics, visit=keep)
    targets = lowest(lower, region.labels, options.latent_targets)
    aim = Aim(tail, params, region.labels, targets, statistics)
    found = attacked_margins(aim, front["box"], options, region.generator)
    attacked = worst_case(lower.scatter(1, targets, found), region.labels)
    attacked = attacked.detach() + options.gradient_scale * (attacked - attacked.detach())
    return attacked * worst_case(lower, region.labels)
