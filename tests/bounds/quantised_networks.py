"""Small networks with quantised activations, also such that values beside ties of the rounding are frequent."""

from dataclasses import replace
from fractions import Fraction

import torch
from small_networks import SHAPE, network
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, Stored, materialize

INTEGERS = parse_level("w8a8")
KINDS = ("mlp", "conv", "stride and padding", "deep conv", "max pool", "padded average pool", "residual", "leaky")
ODD = 1 + 2.0**-22 + 2.0**-23


def quantiser(scale: float = 0.25, zero_point: int = 0, low: int = 0, high: int = 255) -> Node:
    return Node("q", "quantize", ("input",), {"scale": scale, "zero_point": zero_point, "low": low, "high": high})


def stairs(node: Node, x: float) -> Fraction:
    """The definition, in rational numbers."""
    low, high = node["low"] - node["zero_point"], node["high"] - node["zero_point"]
    return min(max(round(Fraction(x) / Fraction(node["scale"])), low), high) * Fraction(node["scale"])


def examples(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def integers(kind: str, seed: int = 0, gain: float = 1.5) -> Compressed:
    """A random network at level w8a8."""
    graph, params = network(kind, seed, gain)
    return materialize(graph, params, INTEGERS, (examples(40, seed), torch.arange(40) % 3))


def beside_ties(kind: str, seed: int = 0, odd: float = ODD) -> Compressed:
    """One whose weights' scales are powers of two, and those of activations powers of two times the same odd number.

    Then sums are often ties in real numbers, while their terms are rounded in float32: the order of a sum, a product
    instead of a quotient, or an exact sum of integers decides between two codes. With ``odd`` 1 nothing is rounded, and
    ties are ties in every way of computing them.
    """
    made = integers(kind, seed)

    def power(value: float) -> float:
        return float(2.0 ** torch.tensor(value).log2().round())

    nodes = [
        n if n.op != "quantize" else replace(n, attributes={**n.attributes, "scale": power(n["scale"]) * odd})
        for n in made.graph.nodes
    ]
    graph, stored = Graph(tuple(nodes), made.graph.input_shape), dict(made.stored)
    scales = {n.name: behind(graph, n.inputs[0])["scale"] for n in graph.weighted()}
    for name, scale in scales.items():
        weight = stored[f"{name}.weight"]
        units = torch.tensor([power(float(s)) for s in weight.scale])  # type: ignore[union-attr]
        stored[f"{name}.weight"] = replace(weight, scale=units)
        if (bias := stored.get(f"{name}.bias")) is not None:
            whole = torch.round(bias.tensor / (units * scale)).to(torch.int32)
            stored[f"{name}.bias"] = Stored("integer", whole, torch.tensor(scale) * units, 32)
    return Compressed(made.level, graph, stored)


def narrow(kind: str, seed: int = 0) -> Compressed:
    """One whose quantisers, but the first, reach a third as far as they should: many codes saturate."""
    made = integers(kind, seed)
    first = next(n for n in made.graph.nodes if n.op == "quantize")
    nodes = [
        n if n.op != "quantize" or n is first else replace(n, attributes={**n.attributes, "scale": n["scale"] / 3})
        for n in made.graph.nodes
    ]
    return replace(made, graph=Graph(tuple(nodes), made.graph.input_shape))


def behind(graph: Graph, name: str) -> Node:
    node = graph[name]
    while node.op != "quantize":
        node = graph[node.inputs[0]]
    return node


def doubled(made: Compressed) -> tuple[Graph, Params]:
    return made.graph, {k: v.double() for k, v in made.params.items()}


def on_the_grid(made: Compressed, count: int, seed: int = 0) -> Tensor:
    """Images of codes and halves of codes of the first quantiser: ties already at the input."""
    first = next(n for n in made.graph.nodes if n.op == "quantize")
    steps = int(1 / first["scale"])
    drawn = torch.randint(0, 2 * steps + 1, (count, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return (drawn * first["scale"] / 2).clamp(0, 1).float()
