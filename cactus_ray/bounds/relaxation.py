"""Linear relaxations of the nodes that are not linear: ReLU and max pooling here, quantisers in ``quantizer``.

Each is a pair of linear functions below and above the node on a box of its input, sound as rounded. A NaN or
infinite box gives NaN slopes, so the bounds that use them are NaN and prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Node, slope_of
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rows import Rows, Shape, contract


class Relaxation(Protocol):
    """Linear functions below and above a node that is not linear."""

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """Forms over the node's input of the given shape that are below forms over its output; constants [B, S]."""
        ...

    def select(self, samples: Tensor) -> Relaxation:
        """The relaxation of some samples of the batch."""
        ...


@dataclass(frozen=True, slots=True)
class ReluRelaxation:
    """``lower_slope * x <= f(x) <= upper_slope * x + intercept`` for a (leaky) ReLU f, elementwise; all [B, *shape]."""

    lower_slope: Tensor
    upper_slope: Tensor
    intercept: Tensor

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """Forms over relu(x) bounded from below by forms over x, and their constants [B, S]."""
        lower, upper, intercept = self.placed(rows)
        positive, negative = rows.coefficients.clamp(min=0), rows.coefficients.clamp(max=0)
        return Rows(positive * lower + negative * upper, rows.origin), contract(negative, intercept)

    def placed(self, rows: Rows) -> tuple[Tensor, ...]:
        """Lower slopes, upper slopes and intercepts where the coefficients are; they broadcast against them."""
        return rows.overs(self.lower_slope, self.upper_slope, self.intercept)

    def select(self, samples: Tensor) -> ReluRelaxation:
        """The relaxation of some samples of the batch."""
        return ReluRelaxation(self.lower_slope[samples], self.upper_slope[samples], self.intercept[samples])


@dataclass(frozen=True, slots=True)
class MaxPoolRelaxation:
    """``x[below] <= max(window) <= slope * x[above] + intercept``; all [B, C, h, w] over the pooled map.

    ``below`` and ``above`` are flat positions in the input's map [H * W].
    """

    below: Tensor
    above: Tensor
    slope: Tensor
    intercept: Tensor

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """Forms over the pooled map bounded from below by forms over its input of the given shape."""
        coefficients = rows.dense(tuple(self.slope.shape[1:])).coefficients
        positive, negative = coefficients.clamp(min=0).flatten(3), coefficients.clamp(max=0)
        constant = contract(negative, self.intercept[:, None])
        negative = (negative * self.slope[:, None]).flatten(3)
        pulled = coefficients.new_zeros(*coefficients.shape[:2], shape[0], shape[1] * shape[2])
        pulled.scatter_add_(3, self.below.flatten(2)[:, None].expand_as(positive), positive)
        pulled.scatter_add_(3, self.above.flatten(2)[:, None].expand_as(negative), negative)
        return Rows(pulled.view(*coefficients.shape[:2], *shape)), constant

    def select(self, samples: Tensor) -> MaxPoolRelaxation:
        """The relaxation of some samples of the batch."""
        return MaxPoolRelaxation(*(t[samples] for t in (self.below, self.above, self.slope, self.intercept)))


RELAXED = (*RELUS, "max_pool2d", "quantize")
"""The operators that are not linear."""
SLACK = 16.0
"""Machine epsilons of the largest term by which the line above is lifted: it stays above although its slope, its
intercept and the ends of its box are rounded. Less than half of it is needed; the rest pays for sums of intercepts."""


def relax_relu(box: Box, slope: float = 0.0) -> ReluRelaxation:
    """Chord above; below the branch that leaves less area (CROWN, Zhang et al. 2018, Sec. 3.3).

    ``slope`` in [0, 1] is that of the negative branch: 0 for a ReLU, more for a leaky one.
    """
    lower, upper = box.lower, box.upper
    on, off = lower >= 0, upper <= 0  # both false for NaN
    one, zero, leak = torch.ones_like(lower), torch.zeros_like(lower), torch.full_like(lower, slope)
    width = torch.where(on | off, one, upper - lower)  # 0/0 would put NaN into the gradient of what is not used
    chord = (upper - slope * lower) / width
    upper_slope = torch.where(on, one, torch.where(off, leak, chord))
    # the quotient first: a product of small ends would underflow. The slack covers the rounding of both coefficients
    slack = SLACK * torch.finfo(lower.dtype).eps * (upper - slope * lower)
    intercept = torch.where(on | off, zero, -lower * (1 - slope) * (upper / width) + slack)
    lower_slope = torch.where(on | ((upper > -lower) & ~off), one, leak)
    broken = ~(torch.isfinite(lower) & torch.isfinite(upper))
    return ReluRelaxation(
        lower_slope.masked_fill(broken, torch.nan), upper_slope.masked_fill(broken, torch.nan), intercept
    )


def relax_max_pool(node: Node, box: Box) -> MaxPoolRelaxation:
    """Below: the entry with the largest lower end. Above: with i the entry of the largest upper end and m the largest
    upper end of the others, ``max(window) <= max(x_i, m)``, which is convex in x_i, so its chord on [l_i, u_i] is
    above it; exact where l_i >= m.
    """
    kernel, stride, padding = node["kernel"], node["stride"], node["padding"]
    _, below = F.max_pool2d(box.lower, kernel, stride, padding, return_indices=True)
    upper, above = F.max_pool2d(box.upper, kernel, stride, padding, return_indices=True)
    lower = box.lower.flatten(2).gather(2, above.flatten(2)).view_as(above)
    # the largest upper end of the others: the window's own maximum is removed by its position
    spread = F.pad(box.upper, (padding[1], padding[1], padding[0], padding[0]), value=-torch.inf)
    windows = spread.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)
    best = windows.argmax(4, keepdim=True)
    others = windows.scatter(4, best, -torch.inf).amax(4)
    rest = torch.maximum(lower, others)  # value of max(x_i, m) at x_i = l_i
    exact = lower >= others
    width = torch.where(exact, torch.ones_like(upper), upper - lower)  # 0/0 would put NaN into the gradient
    slope = torch.where(exact, torch.ones_like(upper), (upper - rest) / width)
    slack = SLACK * torch.finfo(lower.dtype).eps * (upper.abs() + lower.abs() + rest.abs())
    intercept = torch.where(exact, torch.zeros_like(upper), rest - slope * lower) + slack
    broken = ~(torch.isfinite(lower) & torch.isfinite(upper) & ~torch.isnan(others))
    return MaxPoolRelaxation(below, above, slope.masked_fill(broken, torch.nan), intercept)


def relax(node: Node, box: Box) -> ReluRelaxation | MaxPoolRelaxation:
    """The relaxation of a (leaky) ReLU or max-pool node on a box of its input."""
    return relax_relu(box, slope_of(node)) if node.op in RELUS else relax_max_pool(node, box)
