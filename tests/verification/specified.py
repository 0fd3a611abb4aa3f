"""Specifications as text, and networks as a runtime would run them."""

from collections.abc import Sequence

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.verification.witness import Replay

Network = tuple[Graph, Params]


def specification(box: Sequence[tuple[float, float]], outputs: int, unsafe: str) -> str:
    declared = [f"X_{i}" for i in range(len(box))] + [f"Y_{j}" for j in range(outputs)]
    bounds = [f"(assert (>= X_{i} {low!r})) (assert (<= X_{i} {high!r}))" for i, (low, high) in enumerate(box)]
    return "\n".join([*(f"(declare-const {name} Real)" for name in declared), *bounds, f"(assert {unsafe})"])


def runtime(network: Network) -> Replay:
    """The network in float32, as a file would compute it."""
    graph, params = network
    return lambda points: forward(graph, {k: v.float() for k, v in params.items()}, points)
