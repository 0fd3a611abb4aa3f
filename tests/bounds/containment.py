"""One check for every bound engine: the bounds contain what the network really computes.

``violations`` samples points of the ball (the image, random points, corners, corners steered by gradients), evaluates
all nodes there, and lists what lies outside the claimed bounds. It runs on the engines as they are (nothing found) and
on planted faults (found).
"""

import torch
from torch import Tensor

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Node, Params, forward
from cactus_ray.bounds.interval import Box

SLACK = 1e-9
DOMAIN = (0.0, 1.0)


def points_of(images: Tensor, epsilon: float, count: int, seed: int) -> list[Tensor]:
    """Images [N, ...] of the ball and the domain: the centre, ``count`` random points and ``count`` corners.

    Written without ``interval.ball``, which is under test.
    """
    generator = torch.Generator().manual_seed(seed)
    lower, upper = images.sub(epsilon).clamp(*DOMAIN), images.add(epsilon).clamp(*DOMAIN)
    found = [images, lower, upper]
    for _ in range(count):
        share = torch.rand(images.shape, generator=generator, dtype=images.dtype)
        found += [lower + share * (upper - lower), torch.where(share < 0.5, lower, upper)]
    return found


def steered_points(graph: Graph, params: Params, images: Tensor, epsilon: float, count: int, seed: int) -> list[Tensor]:
    """Corners at which single neurons and margins are near their extremes: random points miss those by far."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = images.sub(epsilon).clamp(*DOMAIN), images.add(epsilon).clamp(*DOMAIN)
    found = []
    for _ in range(count):
        for node in graph.nodes[1:]:
            pick: Tensor | None = None
            for sign in (1, -1):
                x = images
                for _ in range(3):
                    x = x.detach().requires_grad_()
                    values: dict[str, Tensor] = {}
                    forward(
                        graph, params, x, visit=lambda n, y, values=values: values.__setitem__(n.name, y.flatten(1))
                    )
                    y = values[node.name]
                    if pick is None:  # a neuron of every sample; of the output a difference of two logits
                        pick = torch.zeros_like(y).scatter_(
                            1, torch.randint(y.shape[1], (len(y), 1), generator=generator), 1.0
                        )
                        pick = pick - pick.roll(1, 1) if node is graph.output else pick
                    (gradient,) = torch.autograd.grad((y * pick).sum(), x)
                    x = torch.where(sign * gradient > 0, lower, upper)
                found.append(x.detach())
    return found


def claims(
    graph: Graph, params: Params, box: Box, labels: Tensor
) -> tuple[dict[str, dict[str, Box]], dict[str, Tensor]]:
    """What the engines say: boxes of nodes and lower bounds of margins, by engine. Each engine stands alone."""
    boxes: dict[str, dict[str, Box]] = {"ibp": {}, "crown": linear.intermediate_boxes(graph, params, box)}
    interval.propagate(graph, params, box, visit=lambda n, b: boxes["ibp"].__setitem__(n.name, b))
    ibp = interval.margins(graph, params, box, labels)
    nothing = torch.full_like(ibp, -torch.inf)
    over_ibp = linear.Effort(intermediate="ibp")
    return boxes, {
        "ibp": ibp,
        "crown": linear.crown_margins(graph, params, box, labels, known=nothing),
        "crown over ibp": linear.crown_margins(graph, params, box, labels, known=nothing, effort=over_ibp),
    }


def violations(
    graph: Graph, params: Params, images: Tensor, epsilon: float, *, count: int = 20, seed: int = 0
) -> list[str]:
    """What the bounds get wrong at sampled points: empty for a sound engine."""
    classes = forward(graph, params, images[:1]).shape[1]
    labels = torch.arange(len(images)) % classes
    box = interval.ball(images, epsilon, DOMAIN)
    boxes, margins = claims(graph, params, box, labels)
    found = []
    if (box.lower < DOMAIN[0] - SLACK).any() or (box.upper > DOMAIN[1] + SLACK).any():
        found.append("the ball leaves the domain")
    points = points_of(images, epsilon, count, seed)
    for point in points + steered_points(graph, params, images, epsilon, 1 + count // 5, seed):
        values: dict[str, Tensor] = {}

        def keep(node: Node, value: Tensor, values: dict[str, Tensor] = values) -> None:
            values[node.name] = value

        logits = forward(graph, params, point, visit=keep)
        for engine, named in boxes.items():
            for name, claimed in named.items():
                outside = torch.maximum(claimed.lower - values[name], values[name] - claimed.upper)
                if not bool((outside <= SLACK).all()):
                    found.append(f"{engine}: node {name} by {outside.max():.3g}")
        true = logits.gather(1, labels[:, None]) - logits
        for engine, lower in margins.items():
            above = (lower - true).scatter(1, labels[:, None], 0.0)
            if not bool((above <= SLACK).all()):
                found.append(f"{engine}: margin by {above.max():.3g}")
    return found
