"""Interval bound propagation in midpoint-radius form (Gowal et al. 2018, Eq. 6-7).

Every function is differentiable, and sound in real arithmetic: the box of a node contains every value that the node
takes on the input box. With a ``Rounding`` also every value that floating point can compute there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import (
    Graph,
    Node,
    Params,
    Statistics,
    apply_node,
    avg_pool2d,
    batch_norm_affine,
    conv2d,
    per_channel,
)

if TYPE_CHECKING:
    from cactus_ray.bounds.rounding import Rounding


_SLICE = 2**17
"""Numbers that stay in a CPU's cache beside some temporaries."""


@dataclass(frozen=True, slots=True)
class Box:
    """All points between ``center - radius`` and ``center + radius``, elementwise; both [N, ...], radius >= 0."""

    center: Tensor
    radius: Tensor

    @staticmethod
    def between(lower: Tensor, upper: Tensor) -> Box:
        # as exact as a division, and faster; in place, since fresh memory costs more than the arithmetic
        return Box((lower + upper).mul_(0.5), (upper - lower).mul_(0.5))

    @property
    def lower(self) -> Tensor:
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        return self.center + self.radius


def ball(images: Tensor, epsilon: float, domain: tuple[float, float]) -> Box:
    """The linf ball of radius ``epsilon`` (>= 0, pixel units) around images [N, C, H, W], clipped to the domain.

    An image outside the domain gives the part of its ball inside, or where there is none the domain's nearest point.
    """
    return Box.between((images - epsilon).clamp(*domain), (images + epsilon).clamp(*domain))


def propagate(
    graph: Graph,
    params: Params,
    box: Box,
    *,
    statistics: Statistics | None = None,
    until: str | None = None,
    visit: Callable[[Node, Box], object] | None = None,
    rounding: Rounding | None = None,
) -> Box:
    """Box of the logits, or of node ``until``. ``visit`` sees every node with its box.

    ``statistics``: batch-norm statistics to use instead of the running ones, without ``rounding``.
    ``rounding``: boxes of what is computed in its arithmetic, the rounding of the boxes themselves included.
    """
    boxes: dict[str, Box] = {}
    for node in graph.nodes:
        inputs = [boxes[i] for i in node.inputs]
        if node.op == "input":
            y = box if rounding is None else rounding.seal(box)
        else:
            y = step(node, params, inputs, statistics) if rounding is None else rounding.step(node, params, inputs)
        boxes[node.name] = y
        if visit is not None:
            visit(node, y)
        if node.name == until:
            return y
    return boxes[graph.output.name]


def step(node: Node, params: Params, inputs: list[Box], statistics: Statistics | None = None) -> Box:
    """Box of one node's output for boxes of its inputs."""
    x = inputs[0]
    match node.op:
        case "conv2d":
            radius = conv2d(node, x.radius, params[f"{node.name}.weight"].abs(), None)
            return Box(apply_node(node, params, [x.center]), radius)
        case "linear":
            radius = F.linear(x.radius, params[f"{node.name}.weight"].abs())
            return Box(apply_node(node, params, [x.center]), radius)
        case "batch_norm" | "scale_shift":
            if node.op == "batch_norm":
                scale, _ = batch_norm_affine(node, params, statistics)
            else:
                scale = params[f"{node.name}.scale"]
            return Box(apply_node(node, params, [x.center], statistics), x.radius * per_channel(scale.abs(), x.radius))
        case "relu":
            center, radius = torch.broadcast_tensors(x.center, x.radius)  # type: ignore[no-untyped-call]
            return Box(*_ReLU.apply(center, radius))  # type: ignore[no-untyped-call]
        case "leaky_relu" | "max_pool2d" | "quantize":
            return Box.between(apply_node(node, params, [x.lower]), apply_node(node, params, [x.upper]))
        case "avg_pool2d":
            return Box(avg_pool2d(node, x.center), avg_pool2d(node, x.radius))
        case "flatten":
            return Box(x.center.flatten(1), x.radius.flatten(1))
    return Box(inputs[0].center + inputs[1].center, inputs[0].radius + inputs[1].radius)  # add


class _ReLU(torch.autograd.Function):
    """Box of the ReLU of a box: it is monotone, so ends go to ends.

    Written out, and in slices that stay in a CPU's cache, because the time goes into moving memory; only the result is
    kept for the backward pass, where an end counts as positive if that can be told from center and radius.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.empty_like(center), torch.empty_like(radius)
        for c, r, of_c, of_r in _sliced(center, radius, *found):
            lower, upper = (c - r).relu_(), (c + r).relu_()
            torch.add(lower, upper, out=of_c).mul_(0.5)
            torch.sub(upper, lower, out=of_r).mul_(0.5)
        ctx.save_for_backward(*found)
        return found

    @staticmethod
    def backward(ctx: Any, of_center: Tensor, of_radius: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        center, radius = ctx.saved_tensors
        found = torch.empty_like(center), torch.empty_like(radius)
        pass_on = torch.ops.aten.threshold_backward
        for c, r, of_c, of_r, to_c, to_r in _sliced(center, radius, of_center, of_radius, *found):
            upper, lower = pass_on(of_c + of_r, c, 0), pass_on(of_c - of_r, c - r, 0)
            torch.add(lower, upper, out=to_c).mul_(0.5)
            torch.sub(upper, lower, out=to_r).mul_(0.5)
        return found


def _sliced(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the batch, of as many images as make up ``_SLICE`` numbers; on a GPU one."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _SLICE:
        return iter((tensors,))
    images = max(1, _SLICE * len(first) // first.numel())
    return zip(*(torch.split(tensor, images) for tensor in tensors), strict=True)


def mixing(graph: Graph) -> dict[str, int]:
    """How far a node's interval box is from exact. 0: neurons vary independently; 1: every end is attained; 2: neither.

    One layer that mixes independent inputs has exact interval bounds; CROWN gains nothing there.
    """
    level: dict[str, int] = {}
    for node in graph.nodes:
        below = max((level[i] for i in node.inputs), default=0)
        match node.op:
            case "conv2d" | "linear" | "avg_pool2d" | "max_pool2d":
                level[node.name] = 1 if below == 0 else 2
            case "add":
                level[node.name] = 2
            case _:
                level[node.name] = below
    return level


def margins(
    graph: Graph,
    params: Params,
    box: Box,
    labels: Tensor,
    *,
    statistics: Statistics | None = None,
    visit: Callable[[Node, Box], object] | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Lower bounds [N, classes] of ``logit[label] - logit[j]`` over the box; 0 at j = label.

    ``statistics``, ``visit``, ``rounding``: see propagate. Where the network ends in a linear layer, it is merged with
    the difference ("elided"), which is tighter; what is deployed rounds both logits, so both are charged.
    """
    last = graph.output
    if last.op != "linear":
        out = propagate(graph, params, box, statistics=statistics, visit=visit, rounding=rounding)
        out = out if rounding is None else rounding.seal(out)
        lower = out.lower.gather(1, labels[:, None]) - out.upper
        return lower.scatter(1, labels[:, None], 0.0)
    x = propagate(graph, params, box, statistics=statistics, until=last.inputs[0], visit=visit, rounding=rounding)
    weight, bias = params[f"{last.name}.weight"], params.get(f"{last.name}.bias")
    difference = weight[labels][:, None, :] - weight[None]  # [N, classes, features]
    lower = torch.einsum("nkf,nf->nk", difference, x.center) - torch.einsum("nkf,nf->nk", difference.abs(), x.radius)
    lower = lower if bias is None else lower + bias[labels][:, None] - bias[None]
    charge = None if rounding is None else rounding.charge(last, params, [x])
    if charge is None:
        return lower
    return (lower - (charge.gather(1, labels[:, None]) + charge)).scatter(1, labels[:, None], 0.0)
