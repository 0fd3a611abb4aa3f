"""The losses of one network on one batch. All are means over the batch and differentiable in every tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Graph, Node, Params, Statistics, forward
from cactus_ray.bounds.interval import Box, margins
from cactus_ray.training.attacks import small_box

Visitor = Callable[[Node, Box], object]


@dataclass(frozen=True, slots=True)
class Region:
    """Where a certified loss looks: the ball around each image, and a bad point in it where the loss needs one."""

    labels: Tensor
    ball: Box
    point: Tensor | None = None
    box_ratio: float = 1.0

    def first(self, count: int) -> Region:
        """The region of the first ``count`` images."""
        ball = Box(self.ball.center[:count], self.ball.radius[:count])
        point = None if self.point is None else self.point[:count]
        return Region(self.labels[:count], ball, point, self.box_ratio)


class CertifiedLoss(Protocol):
    """A scalar loss over regions. ``visit`` sees the box of every node."""

    def __call__(
        self,
        graph: Graph,
        params: Params,
        region: Region,
        *,
        statistics: Statistics | None = None,
        visit: Visitor | None = None,
    ) -> Tensor: ...


def standard(graph: Graph, params: Params, images: Tensor, labels: Tensor, statistics: Statistics) -> Tensor:
    """Cross-entropy on clean images. Batch norm uses the batch's statistics, which are stored in ``statistics``."""
    return F.cross_entropy(forward(graph, params, images, collect=statistics), labels)


def worst_case(lower_margins: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that the bounds allow (Gowal et al. 2018, Eq. 12; Wong & Kolter 2018, Eq. 12).

    ``lower_margins`` [N, classes]: lower bounds of logit[label] - logit[j], 0 at the label.
    """
    return F.cross_entropy(-lower_margins, labels)


def ibp(
    graph: Graph,
    params: Params,
    region: Region,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """Interval bounds over the whole ball (Gowal et al. 2018, Sec. 3; Shi et al. 2021): an upper bound of the loss."""
    lower = margins(graph, params, region.ball, region.labels, statistics=statistics, visit=visit)
    return worst_case(lower, region.labels)


def sabr(
    graph: Graph,
    params: Params,
    region: Region,
    *,
    statistics: Statistics | None = None,
    visit: Visitor | None = None,
) -> Tensor:
    """Interval bounds over a small box around an adversarial point (SABR: Mueller et al. 2023, Sec. 3, Eq. 5).

    No bound of the loss over the ball; ``region.point`` must be given.
    """
    if region.point is None:
        raise ValueError("sabr needs region.point")
    box = small_box(region.ball, region.point, region.box_ratio)
    lower = margins(graph, params, box, region.labels, statistics=statistics, visit=visit)
    return worst_case(lower, region.labels)


CERTIFIED_LOSSES: dict[str, CertifiedLoss] = {"ibp": ibp, "sabr": sabr}
ATTACKED = frozenset({"sabr"})
"""The losses that need ``Region.point``."""


class RampRegularizer:
    """Tightness and balance of the ReLUs, as a visitor of one bound pass (Shi et al. 2021, Eq. 10-12).

    Per ReLU: ``relu(t - r_in / r) / t`` keeps the mean radius r in front of it from growing beyond that of the input;
    ``relu(t - rho) / t`` for mean and for variance keeps the stably active and inactive centres in balance, rho being
    the smaller of their ratio and its inverse. A ReLU without stable neurons on both sides has no balance term.
    """

    def __init__(self, tolerance: float = 0.5) -> None:
        self.tolerance = tolerance
        self._boxes: dict[str, Box] = {}
        self._input: Box | None = None
        self._relus: list[Box] = []

    def __call__(self, node: Node, box: Box) -> None:
        if node.op == "input":
            self._input = box
        elif node.op in RELUS:
            self._relus.append(self._boxes[node.inputs[0]])
        self._boxes[node.name] = box

    def value(self) -> Tensor:
        """The mean over the ReLUs that were seen; a scalar, 0 without any."""
        assert self._input is not None, "no bound pass was seen"
        first = self._input.radius.mean()
        terms = [self._tightness(first, box) + self._balance(box) for box in self._relus]
        return torch.stack(terms).mean() if terms else first.new_zeros(())

    def _shortfall(self, ratio: Tensor) -> Tensor:
        return F.relu(self.tolerance - ratio) / self.tolerance

    def _tightness(self, first: Tensor, box: Box) -> Tensor:
        return self._shortfall(first / box.radius.mean().clamp(min=1e-12))

    def _balance(self, box: Box) -> Tensor:
        active, inactive = (box.lower > 0).to(box.center.dtype), (box.upper < 0).to(box.center.dtype)
        spread = (box.center - box.center.mean()).square()
        pairs = (
            ((box.center * active).mean(), -(box.center * inactive).mean()),
            ((spread * active).mean(), (spread * inactive).mean()),
        )
        total = box.center.new_zeros(())
        for a, b in pairs:
            usable = (a > 1e-12) & (b > 1e-12)  # the unusable side must not put NaN into the gradient
            a, b = torch.where(usable, a, 1.0), torch.where(usable, b, 1.0)
            total = total + torch.where(usable, self._shortfall(torch.minimum(a / b, b / a)), 0.0)
        return total
