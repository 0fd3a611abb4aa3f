"""NRSLoss: neurons kept stable, so that a pruned network stays certifiable (Li et al. 2022, "Can pruning improve
certified robustness of neural networks?").

The stability of pre-activation bounds l and u, measured in units of the batch norm in front of them, is added to the
certified loss. The authors prune iteratively, with rewinding; here one network is trained once, and levels prune it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Graph, Node, Params, per_channel
from cactus_ray.bounds.interval import Box, propagate
from cactus_ray.training.losses import UNBOUNDED
from cactus_ray.training.step import Step, full_loss


def nrsloss(step: Step) -> Iterator[Tensor]:
    """Standard and certified loss plus ``nrs_weight`` times the instability of the neurons.

    The bounds are those of the certified loss (with sabr of its small box); beside a loss without bounds, interval
    bounds over the ball, which is how the authors train.
    """
    config = step.config
    kind, weight = config.certified_loss, config.nrs_weight
    assert kind is not None
    assert weight is not None
    instability = Instability(step.graph, step.params)
    loss, region = full_loss(step, kind, visit=instability)
    if step.certifies and kind in UNBOUNDED:
        propagate(step.graph, step.params, region.ball, statistics=step.statistics, visit=instability)
    yield loss + weight * instability.value() if step.certifies else loss


class Instability:
    """``-tanh(1 + l * u / (gamma^2 + 1e-8))``, as a visitor of one bound pass; gamma detached (their Eq. 5).

    Gamma: the weight of the batch norm in front of the ReLU, by channel; 1 where there is none.
    """

    def __init__(self, graph: Graph, params: Params) -> None:
        self.graph, self.params = graph, params
        self._boxes: dict[str, Box] = {}
        self._terms: list[Tensor] = []

    def __call__(self, node: Node, box: Box) -> None:
        self._boxes[node.name] = box
        if node.op in RELUS:
            before = self._boxes[node.inputs[0]]
            self._terms.append(torch.tanh(1.0 + before.lower * before.upper / self._unit(node, before)))

    def value(self) -> Tensor:
        """The mean over all neurons and images that were seen, in [-1, 1]; 0 without any ReLU."""
        if not self._terms:
            return next(iter(self._boxes.values())).center.new_zeros(())
        return -torch.cat([term.flatten() for term in self._terms]).mean()

    def _unit(self, relu: Node, before: Box) -> Tensor | float:
        source = self.graph[relu.inputs[0]]
        gamma = self.params.get(f"{source.name}.weight") if source.op == "batch_norm" else None
        if gamma is None:
            return 1.0
        return per_channel(gamma.detach(), before.center).square() + 1e-8
