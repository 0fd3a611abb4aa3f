"""What all losses share: where they look, what they can be told, how bounds become a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Graph, Node, Params, Statistics
from cactus_ray.bounds.interval import Box, margins, step
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.training.layout import merged

Visitor = Callable[[Node, Box], object]


@dataclass(frozen=True, slots=True)
class Region:
    """Where a certified loss looks: the ball around each image, and a bad point where the loss needs one.

    The point lies in the ball, except for the expressive losses, which may attack a larger one. ``generator``: on the
    images' device; draws the starts of latent attacks.
    """

    labels: Tensor
    ball: Box
    point: Tensor | None = None
    generator: torch.Generator | None = None

    def first(self, count: int) -> Region:
        """The region of the first ``count`` images."""
        ball = Box(self.ball.center[:count], self.ball.radius[:count])
        point = None if self.point is None else self.point[:count]
        return Region(self.labels[:count], ball, point, self.generator)

    def attacked(self, loss: str) -> Tensor:
        """The point. Raises ValueError that names the loss where there is none."""
        if self.point is None:
            raise ValueError(f"{loss} needs region.point")
        return self.point


@dataclass(frozen=True, slots=True)
class LossOptions:
    """The options of all losses under the names that they have in ``RunConfig``; each loss reads its own."""

    box_ratio: float = 1.0
    relu_shrinkage: float = 1.0
    ibp_weight: float = 0.5
    tail_layers: int = 2
    latent_steps: int = 10
    latent_restarts: int = 1
    latent_targets: int = 10
    gradient_scale: float = 1.0
    crown_weight: float = 1.0


class CertifiedLoss(Protocol):
    """A scalar loss over regions: a mean over the batch, differentiable in every tensor.

    ``statistics``: batch-norm statistics of the clean batch, with which everything is normalised; None: the running
    ones. The expressive losses replace them in place by those of their adversarial batch. ``visit`` sees the box of
    every node.
    """

    def __call__(
        self,
        graph: Graph,
        params: Params,
        region: Region,
        options: LossOptions,
        *,
        statistics: Statistics | None = None,
        visit: Visitor | None = None,
    ) -> Tensor: ...


def worst_case(lower_margins: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that the bounds allow (Gowal et al. 2018, Eq. 12; Wong & Kolter 2018, Eq. 12).

    ``lower_margins`` [N, classes]: lower bounds of logit[label] - logit[j], 0 at the label.
    """
    return F.cross_entropy(-lower_margins, labels)


def box_margins(
    graph: Graph,
    params: Params,
    box: Box,
    labels: Tensor,
    shrinkage: float,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """Interval bounds [N, classes] of the margins over a box, as ``interval.margins``.

    With ``shrinkage`` < 1 the upper bounds of unstable ReLUs are multiplied by it (Mueller et al. 2023): then
    they are **no bounds at all**, unsound, for training only. That needs a network which ends in a linear layer.
    """
    graph, params = merged(graph, params, statistics)
    if shrinkage == 1.0:
        return margins(graph, params, box, labels, statistics=statistics, visit=visit)
    last = graph.output
    if last.op != "linear":
        raise UnsupportedGraphError(f"relu_shrinkage = {shrinkage}: the network ends in {last.op}, not in linear")
    boxes: dict[str, Box] = {}
    for node in graph.nodes[:-1]:
        inputs = [boxes[name] for name in node.inputs]
        if node.op in RELUS:
            inputs = [_shrunk(inputs[0], shrinkage)]
        boxes[node.name] = box if node.op == "input" else step(node, params, inputs, statistics)
        if visit is not None:
            visit(node, boxes[node.name])
    before = boxes[last.inputs[0]]
    only_last = Graph((Node(last.inputs[0], "input"), last), tuple(before.center.shape[1:]))
    return margins(only_last, params, before, labels)


def _shrunk(box: Box, shrinkage: float) -> Box:
    lower, upper = box.lower, box.upper
    unstable = (lower < 0) & (upper > 0)
    return Box.between(lower, torch.where(unstable, shrinkage * upper, upper))
