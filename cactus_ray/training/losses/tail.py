"""The attacked last part of a network, for TAPS and STAPS (Mao et al. 2023, arXiv 2305.04574).

The box in front of the tail is searched for points with small margins, one search per image and class, and the
gradient at the points is connected with the ends of the box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.errors import ConfigError
from cactus_ray.training.losses.base import LossOptions

_CONNECTED = 0.5  # c of the paper: share of the box at each end from which gradients reach that end
_LEAST_WIDTH = 1e-5


def tail_of(graph: Graph, layers: int) -> Graph:
    """The last ``layers`` convolutions and linear layers with all that follows each of them, as a graph of its own.

    Its input bears the name of the node in front. Raises ConfigError where there are fewer layers or a residual
    connection crosses the cut.
    """
    possible = possible_tails(graph)
    if layers not in possible:
        allowed = f"one of {', '.join(map(str, possible))}: no other cut of this network meets a single tensor"
        raise ConfigError("tail_layers", layers, allowed)
    first = graph.weighted()[-layers]
    shape = graph.input_shape  # of the whole network; the box in front of the tail has its own
    return Graph((Node(first.inputs[0], "input"), *_from(graph, first)), shape)


def possible_tails(graph: Graph) -> list[int]:
    """How many last convolutions and linear layers can be cut off, a single tensor going in; increasing."""
    return [count for count in range(1, len(graph.weighted()) + 1) if _crossing(graph, count) is None]


def _from(graph: Graph, first: Node) -> tuple[Node, ...]:
    return graph.nodes[graph.nodes.index(first) :]


def _crossing(graph: Graph, layers: int) -> Node | None:
    """A node of the tail that reads what is neither in the tail nor right in front of it."""
    first = graph.weighted()[-layers]
    known = {first.inputs[0]}
    for node in _from(graph, first):
        if any(name not in known for name in node.inputs):
            return node
        known.add(node.name)
    return None


def lowest(lower_margins: Tensor, labels: Tensor, count: int) -> Tensor:
    """The classes [N, T] with the smallest bounds, the label's excluded; T = min(count, classes - 1)."""
    others = lower_margins.detach().scatter(1, labels[:, None], torch.inf)
    return others.topk(min(count, others.shape[1] - 1), dim=1, largest=False).indices


@dataclass(frozen=True, slots=True)
class Aim:
    """What is attacked: per image the margins to some classes (``targets`` [N, T]) behind the tail."""

    tail: Graph
    params: Params
    labels: Tensor
    targets: Tensor
    statistics: Statistics | None

    def margins(self, points: Tensor) -> Tensor:
        """logit[label] - logit[target] [N, T] at points [N, T, ...] in front of the tail."""
        shape = self.targets.shape
        logits = forward(self.tail, self.params, points.flatten(0, 1), statistics=self.statistics).view(*shape, -1)
        own = self.labels[:, None, None].expand(*shape, 1)
        return (logits.gather(2, own) - logits.gather(2, self.targets[..., None])).squeeze(2)

    def detached(self) -> Aim:
        """The same without gradients into the network."""
        params = {name: tensor.detach() for name, tensor in self.params.items()}
        frozen = {name: (mean.detach(), var.detach()) for name, (mean, var) in (self.statistics or {}).items()}
        return Aim(self.tail, params, self.labels, self.targets, frozen)


def attacked_margins(aim: Aim, box: Box, options: LossOptions, generator: torch.Generator) -> Tensor:
    """The smallest margins [N, T] found in the box in front of the tail; differentiable in weights and box.

    Costs as many passes of N * T points through the tail as there are steps, and their points have to fit in memory:
    ``latent_targets`` bounds T where there are many classes.
    """
    points = _search(aim.detached(), Box(box.center.detach(), box.radius.detach()), options, generator)
    return aim.margins(_connected(points, box))


def _search(aim: Aim, box: Box, options: LossOptions, generator: torch.Generator) -> Tensor:
    """Points [N, T, ...] of the box: sign steps from uniform starts, the best of all that were met."""
    lower, upper, width = box.lower[:, None], box.upper[:, None], 2.0 * box.radius[:, None]
    shape = (*aim.targets.shape, *box.radius.shape[1:])
    best = torch.full(aim.targets.shape, torch.inf, dtype=lower.dtype, device=lower.device)
    points = lower.expand(shape)
    for _ in range(options.latent_restarts):
        x = torch.lerp(lower, upper, torch.rand(shape, generator=generator, dtype=lower.dtype, device=lower.device))
        for rate in (*_rates(options.latent_steps), None):
            x = x.detach().requires_grad_(rate is not None)
            margin = aim.margins(x)
            better = margin.detach() < best
            best = torch.where(better, margin.detach(), best)
            points = torch.where(better.view(*better.shape, *([1] * (x.dim() - 2))), x.detach(), points)
            if rate is not None:
                (gradient,) = torch.autograd.grad(margin.sum(), x)
                x = torch.clamp(x.detach() - rate * width * gradient.sign(), lower, upper)
    return points


def _rates(steps: int) -> list[float]:
    """Steps as shares of the box's width, which reach both ends; of 10 or more the last 30 % are five times finer."""
    rate = max(0.2, 2.0 / steps)
    return [rate if steps < 10 or done < int(0.7 * steps) else 0.2 * rate for done in range(steps)]


def _connected(points: Tensor, box: Box) -> Tensor:
    """The points, with gradients into the ends of the box (the rectified linear connector of Mao et al. 2023).

    An end receives the share 1 where the point lies on it, falling linearly to 0 at half of the box's width.
    """
    lower, upper = box.lower[:, None], box.upper[:, None]
    with torch.no_grad():
        reach = _CONNECTED * (upper - lower)
        floor = reach.clamp(min=_LEAST_WIDTH)
        near = [reach - (points - lower), reach - (upper - points)]  # how deep inside the reach of each end
        shares = [torch.where(n >= 0, n.clamp(min=0.5 * _LEAST_WIDTH) / floor, 0.0) for n in near]
    pulls = [share * (end - end.detach()) for share, end in zip(shares, (lower, upper), strict=True)]
    return points + pulls[0] + pulls[1]
