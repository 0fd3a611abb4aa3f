"""The attack inside training: short, without host synchronisation, and without weight gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.training.entrance import Entrance
from cactus_ray.training.layout import channels_last, merged


def pgd(
    graph: Graph,
    params: Params,
    labels: Tensor,
    ball: Box,
    *,
    steps: int,
    step_size: float,
    start: Tensor,
    statistics: Statistics | None = None,
) -> Tensor:
    """Points [N, C, H, W] of ``ball`` at which the cross-entropy is high (Madry et al. 2018, Eq. 2).

    ``step_size`` in pixel units; ``start`` in [0, 1] places the first point between the ends of the ball. Sign steps,
    each projected into the ball, which already lies inside the domain. Returns the last point, detached; no gradient
    reaches the weights. ``statistics``: batch-norm statistics to use instead of the running ones.
    """
    with torch.no_grad():
        fixed = channels_last(params)
        if not torch.is_autocast_enabled(start.device.type):  # batch norm stays in float32, apart from its convolution
            graph, fixed = merged(graph, fixed, statistics)
    fixed = {name: tensor.detach() for name, tensor in fixed.items()}
    frozen = {name: (mean.detach(), var.detach()) for name, (mean, var) in (statistics or {}).items()}
    lower, upper = ball.lower, ball.upper
    entrance = Entrance.of(graph, fixed) if start.device.type == "cpu" else None
    x = torch.lerp(lower, upper, start)
    for _ in range(steps):
        leaf = (x if entrance is None else entrance.forward(x)).requires_grad_(True)
        logits = forward(graph if entrance is None else entrance.rest, fixed, leaf, statistics=frozen, in_place=True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
        if entrance is not None:
            gradient = entrance.pull(gradient)
        x = torch.clamp(x.detach() + step_size * gradient.sign(), lower, upper)
    return x


def small_box(ball: Box, point: Tensor, ratio: float) -> Box:
    """SABR's box: ``ratio`` (0 < ratio <= 1) times the ball's width, around ``point`` but inside the ball.

    Mueller et al. 2023, Sec. 3. The width is taken per pixel, so that the box is exact where the ball is cut off by
    the domain (as in CTBench).
    """
    radius = ratio * ball.radius
    slack = ball.radius - radius
    return Box(torch.clamp(point, ball.center - slack, ball.center + slack), radius)
