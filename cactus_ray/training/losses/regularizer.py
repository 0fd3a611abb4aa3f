"""The regularisers of short warm-up, which make the ramp of epsilon possible in few epochs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Node
from cactus_ray.bounds.interval import Box


class RampRegularizer:
    """Tightness and balance of the ReLUs, as a visitor of one bound pass (Shi et al. 2021, Eq. 10-12).

    Per ReLU: ``relu(t - r_in / r) / t`` keeps the mean radius r in front of it from growing beyond that of the input;
    ``relu(t - rho) / t`` for mean and for variance keeps the stably active and inactive centres in balance, rho being
    the smaller of their ratio and its inverse. A ReLU without stable neurons on both sides has no balance term. The
    input is that of the first layer, normalised where the network does so, as in the code of Shi et al. and of CTBench.
    """

    def __init__(self, tolerance: float = 0.5) -> None:
        self.tolerance = tolerance
        self._boxes: dict[str, Box] = {}
        self._input: Box | None = None
        self._relus: list[Box] = []

    def __call__(self, node: Node, box: Box) -> None:
        if node.op == "input" or (node.op == "scale_shift" and self._boxes[node.inputs[0]] is self._input):
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
