"""Weights known up to a radius, in linear bounds: their charge made smaller where it varies with the input.

A form A over the output of a layer whose weights are ``W + D``, ``|D| <= R``, is at least ``A W x - |A| R |x|``.
Rounding charges the constant ``|A| R |x|_max`` (``rounding.py``, *Families*). On a box |x| lies below its chord
``s x + t``, so the form is also at least ``(A W - |A| R s) x - |A| R t``: inputs that cannot be large together are not
charged as if they were. A ``Spread`` adds the linear part and gives ``|A| R (|x|_max - t)`` back; who leaves it out is
sound, only looser.

Rounding: the computed ``|A| R s``, its subtraction, and the two constants are each within g of terms of at most
``|A| (|W| + R) |x|_max``, four in all beside those that ``rounding.py`` counts; 8 g of it are charged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.adjoint import pull_linear
from cactus_ray.bounds.graph import Graph, Node, Params, conv2d
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rows import Rows, Shape


@dataclass(frozen=True, slots=True)
class Spread:
    """``radius``: R of the node. ``slope`` [N, *input shape]: s. ``credit`` [N, *output shape]: R (|x|_max - t)."""

    node: Node
    radius: Tensor
    slope: Tensor
    credit: Tensor

    def improve(self, rows: Rows, pulled: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """Forms over the node's input (of the given shape), and what is given back [N, S].

        ``rows``: forms over its output; ``pulled``: the same over its input with the centre's weights.
        """
        sizes = rows.absolute()
        wide, _ = pull_linear(self.node, {f"{self.node.name}.weight": self.radius}, sizes, shape)
        improved = pulled.coefficients - wide.coefficients * wide.over(self.slope)
        return Rows(improved, pulled.origin), sizes.dot(self.credit)

    def select(self, samples: Tensor) -> Spread:
        """That of some of the samples."""
        return replace(self, slope=self.slope[samples], credit=self.credit[samples])

    def single(self) -> Spread:
        """The same in float32."""
        return Spread(self.node, self.radius.float(), self.slope.float(), self.credit.float())


def spreads(graph: Graph, radii: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> dict[str, Spread]:
    """Of every node with radii whose input is boxed."""
    found = {}
    for node in graph.weighted():
        radius = radii.get(f"{node.name}.weight")
        if radius is None or node.inputs[0] not in boxes:
            continue
        slope, offset, largest = chord(boxes[node.inputs[0]])
        found[node.name] = Spread(node, radius, slope, widened(node, radius, largest - offset))
    return found


def chord(box: Box) -> tuple[Tensor, Tensor, Tensor]:
    """``|x| <= slope * x + offset`` on the box, elementwise, as rounded; and the largest |x|."""
    lower, upper = box.lower, box.upper
    largest = torch.maximum(lower.abs(), upper.abs())
    ratio = (upper.abs() - lower.abs()) / (upper - lower)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, -1.0, ratio.clamp(-1, 1)))
    # |x| is convex, so what holds at both ends holds between them, whatever the slope
    offset = torch.maximum(lower.abs() - slope * lower, upper.abs() - slope * upper)
    return slope, offset.clamp(min=0), largest


def widened(node: Node, radius: Tensor, sizes: Tensor) -> Tensor:
    """``R |x|`` [N, *output shape] for inputs of the given sizes [N, *input shape]."""
    return F.linear(sizes, radius) if node.op == "linear" else conv2d(node, sizes, radius, None)


def check_radii(graph: Graph, params: Params, radii: Mapping[str, Tensor]) -> None:
    """ValueError for radii of anything but weights of layers, of another shape or dtype, or below 0."""
    weights = {f"{node.name}.weight" for node in graph.weighted()}
    for name, radius in radii.items():
        if name not in weights:
            raise ValueError(f"a radius of {name!r}; expected weights of linear or convolutional nodes")
        if radius.shape != params[name].shape or radius.dtype != params[name].dtype or bool((radius < 0).any()):
            raise ValueError(f"radius of {name!r}: expected numbers >= 0 in the tensor's shape and dtype")
