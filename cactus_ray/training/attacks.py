"""The attack inside training: short, without host synchronisation, and without weight gradients."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.training.entrance import Entrance
from cactus_ray.training.layout import channels_last, merged


class SignStep(Protocol):
    """One step of the attack from points ``x`` [N, C, H, W]: ``sign_step``, or the same compiled."""

    def __call__(
        self,
        graph: Graph,
        params: Params,
        x: Tensor,
        labels: Tensor,
        ends: tuple[Tensor, Tensor],
        step_size: float | Tensor,
        statistics: Statistics,
        entrance: Entrance | None,
    ) -> Tensor: ...


def sign_step(
    graph: Graph,
    params: Params,
    x: Tensor,
    labels: Tensor,
    ends: tuple[Tensor, Tensor],
    step_size: float | Tensor,
    statistics: Statistics,
    entrance: Entrance | None,
) -> Tensor:
    """``x`` moved by ``step_size`` along the sign of the cross-entropy's gradient, and projected between the ``ends``.

    All tensors detached. ``entrance``: the first nodes of ``graph``, where they have a way back of their own.
    """

    def loss(leaf: Tensor) -> Tensor:
        behind = graph if entrance is None else entrance.rest
        logits = forward(behind, params, leaf, statistics=statistics, in_place=True)
        return F.cross_entropy(logits, labels, reduction="sum")

    leaf = x if entrance is None else entrance.forward(x)
    if torch.compiler.is_compiling():  # dynamo follows this one, and autograd.grad only behind a private switch
        gradient = torch.func.grad(loss)(leaf)
    else:
        leaf = leaf.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    if entrance is not None:
        gradient = entrance.pull(gradient)
    return torch.clamp(x.detach() + step_size * gradient.sign(), *ends)


def pgd(
    graph: Graph,
    params: Params,
    labels: Tensor,
    ball: Box,
    *,
    steps: int,
    step_size: float | Tensor,
    start: Tensor,
    statistics: Statistics | None = None,
    step: SignStep = sign_step,
) -> Tensor:
    """Points [N, C, H, W] of ``ball`` at which the cross-entropy is high (Madry et al. 2018, Eq. 2).

    ``step_size`` in pixel units; ``start`` in [0, 1] places the first point between the ends of the ball. Sign steps,
    each projected into the ball, which already lies inside the domain. Returns the last point, detached; no gradient
    reaches the weights. ``statistics``: batch-norm statistics to use instead of the running ones. ``step``: how one
    sign step is run.
    """
    with torch.no_grad():
        fixed = channels_last(params)
        if not torch.is_autocast_enabled(start.device.type):  # batch norm stays in float32, apart from its convolution
            graph, fixed = merged(graph, fixed, statistics)
    fixed = {name: tensor.detach() for name, tensor in fixed.items()}
    frozen = {name: (mean.detach(), var.detach()) for name, (mean, var) in (statistics or {}).items()}
    entrance = Entrance.of(graph, fixed) if start.device.type == "cpu" else None
    ends = ball.lower, ball.upper
    x = torch.lerp(*ends, start)
    for _ in range(steps):
        x = step(graph, fixed, x, labels, ends, step_size, frozen, entrance)
    return x


def small_box(ball: Box, point: Tensor, ratio: float) -> Box:
    """SABR's box: ``ratio`` (0 < ratio <= 1) times the ball's width, around ``point`` but inside the ball.

    Mueller et al. 2023, Sec. 3. The width is taken per pixel, so that the box is exact where the ball is cut off by
    the domain (as in CTBench).
    """
    radius = ratio * ball.radius
    slack = ball.radius - radius
    return Box(torch.clamp(point, ball.center - slack, ball.center + slack), radius)
