"""Networks in float32 in any order of their sums, and in exact rational numbers: what charges are held against.

Written in numpy from the definitions of the operators; shares no code with the bounds.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node
from cactus_ray.bounds.trace import trace

Array = NDArray[np.float32]
Sum = Callable[[Array], Array]
"""The sum over the last dimension of float32 terms [F, n], rounded after each addition in some order."""


def forward_order(terms: Array) -> Array:
    total = terms[:, 0].copy()
    for i in range(1, terms.shape[1]):
        total = total + terms[:, i]
    return total


def backward_order(terms: Array) -> Array:
    return forward_order(terms[:, ::-1])


def shuffled(seed: int) -> Sum:
    def total(terms: Array) -> Array:
        return forward_order(terms[:, np.random.default_rng(seed).permutation(terms.shape[1])])

    return total


def pairwise(terms: Array) -> Array:
    while terms.shape[1] > 1:
        odd = terms[:, -1:] if terms.shape[1] % 2 else terms[:, :0]
        terms = np.concatenate(
            [terms[:, 0 : terms.shape[1] - odd.shape[1] : 2] + terms[:, 1::2][:, : terms.shape[1] // 2], odd], 1
        )
    return terms[:, 0]


def by_size(terms: Array) -> Array:
    """Large terms first: small ones are lost."""
    return forward_order(np.take_along_axis(terms, np.argsort(-np.abs(terms), axis=1), 1))


ORDERS: dict[str, Sum] = {
    "forward": forward_order, "backward": backward_order, "pairwise": pairwise, "by size": by_size,
    **{f"shuffled {seed}": shuffled(seed) for seed in range(3)},
}  # fmt: skip


def affine(node: Node, params: Params, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix [outputs, inputs] and bias of a linear layer, convolution or average, exact in float64."""
    double = {k: v.double() for k, v in params.items()}
    size = int(np.prod(shape))
    offset = apply_node(node, double, [torch.zeros(1, *shape, dtype=torch.float64)])
    bare = {k: torch.zeros_like(v) if k.endswith("bias") else v for k, v in double.items()}
    basis = apply_node(node, bare, [torch.eye(size, dtype=torch.float64).view(size, *shape)])
    return basis.flatten(1).T.numpy(), offset.flatten().numpy()


def evaluate(graph: Graph, params: Params, x: torch.Tensor, total: Sum) -> dict[str, Array]:
    """Every node's output, flat, for one float32 image [C, H, W]; ``params`` hold float32 values."""
    shapes = graph.shapes(params)
    values: dict[str, Array] = {}
    for node in graph.nodes:
        inputs = [values[i] for i in node.inputs]
        values[node.name] = (
            x.numpy().astype(np.float32).flatten() if node.op == "input" else _node(node, params, inputs, shapes, total)
        )
    return values


def _node(node: Node, params: Params, inputs: list[Array], shapes: dict[str, tuple[int, ...]], total: Sum) -> Array:
    shape = shapes[node.inputs[0]]

    def get(key: str) -> Array:
        return params[f"{node.name}.{key}"].float().numpy()

    def channels(values: Array) -> Array:
        return np.repeat(values, int(np.prod(shape[1:])))

    match node.op:
        case "conv2d" | "linear":
            matrix, bias = affine(node, params, shape)
            terms = matrix.astype(np.float32) * inputs[0][None]
            return total(np.concatenate([terms, bias.astype(np.float32)[:, None]], 1))
        case "avg_pool2d":
            matrix, _ = affine(node, params, shape)
            count = np.round(1 / np.where(matrix > 0, matrix, 0).max(1)).astype(np.float32)
            return total((matrix > 0).astype(np.float32) * inputs[0][None]) / count
        case "scale_shift":
            return inputs[0] * channels(get("scale")) + channels(get("shift"))
        case "batch_norm":
            scale = get("weight") / np.sqrt(get("running_var") + np.float32(node["eps"]))
            return (inputs[0] - channels(get("running_mean"))) * channels(scale) + channels(get("bias"))
        case "leaky_relu":
            return np.where(inputs[0] > 0, inputs[0], np.float32(node["slope"]) * inputs[0])
        case "add":
            return inputs[0] + inputs[1]
    whole = apply_node(node, params, [torch.from_numpy(inputs[0]).view(1, *shape)])  # exact: relu, max pooling, flatten
    return whole.flatten().numpy()


def exact(layers: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> list[Fraction]:
    """Logits of a ReLU network of linear layers in rational numbers."""
    values = [Fraction(v) for v in x.double().flatten().tolist()]
    for depth, (weight, bias) in enumerate(layers):
        if depth:
            values = [max(v, Fraction(0)) for v in values]
        rows = zip(weight.double().tolist(), bias.double().tolist(), strict=True)
        values = [sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b)) for row, b in rows]
    return values


def doubled(params: Params) -> Params:
    return {k: v.double() for k, v in params.items()}


def layers(*rows_and_biases: tuple[list[list[float]], list[float]], inputs: int) -> tuple[Graph, Params]:
    """A network of linear layers with given numbers, without ReLUs; its image is [1, 1, inputs]."""
    modules = [nn.Linear(len(rows[0]), len(rows)) for rows, _ in rows_and_biases]
    graph, params = trace(nn.Sequential(nn.Flatten(), *modules), (1, 1, inputs))
    for node, (rows, bias) in zip(graph.weighted(), rows_and_biases, strict=True):
        params[f"{node.name}.weight"] = torch.tensor(rows, dtype=torch.float32)
        params[f"{node.name}.bias"] = torch.tensor(bias, dtype=torch.float32)
    return graph, params
