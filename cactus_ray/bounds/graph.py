"""A network as data: a list of nodes plus a dict of tensors.

Everything that CACTUS does to a network (masks, weight perturbations, rounding, folding, channel removal) is a change
of tensors, so the structure is kept apart from them: one ``Graph`` serves every compressed copy. Nothing here is ever
pickled; a graph is JSON and its tensors are safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.errors import UnsupportedGraphError

Params = dict[str, Tensor]
"""Tensors by name: ``{node}.weight``, ``{node}.bias``, ``{node}.running_mean``, ``{node}.running_var``,
``{node}.scale``, ``{node}.shift``."""

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Batch-norm mean and (biased) variance, each of shape [C], by the name of the node."""

OPERATORS = (
    "input", "conv2d", "linear", "batch_norm", "scale_shift", "relu", "leaky_relu", "max_pool2d", "avg_pool2d",
    "flatten", "add", "quantize",
)  # fmt: skip
RELUS = ("relu", "leaky_relu")
"""Operators that keep what is positive and multiply what is negative by ``slope_of``."""
BUFFERS = ("running_mean", "running_var", "scale", "shift")


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. ``name`` is unique and prefixes the names of the node's tensors.

    Attributes by operator (pairs are (height, width)):
    conv2d: stride, padding, dilation (pairs), groups; batch_norm: eps, momentum;
    leaky_relu: slope, between 0 and 1; max_pool2d: kernel, stride, padding (pairs);
    avg_pool2d: kernel, stride, padding (pairs), count_include_pad;
    quantize: scale (a float32 number > 0), zero_point, and the smallest and largest code low and high.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.attributes[key]


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order; the first is the input, the last gives the logits [N, classes]."""

    nodes: tuple[Node, ...]
    input_shape: tuple[int, ...]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """Names of nodes to the nodes that read them."""
        return {n.name: tuple(m for m in self.nodes if n.name in m.inputs) for n in self.nodes}

    def weighted(self) -> tuple[Node, ...]:
        """The convolutions and linear layers, in order: what pruning and quantisation act on."""
        return tuple(n for n in self.nodes if n.op in ("conv2d", "linear"))

    def shapes(self, params: Params) -> dict[str, tuple[int, ...]]:
        """Shape of every node's output for one sample, without the batch dimension."""
        found: dict[str, tuple[int, ...]] = {}
        device = next(iter(params.values())).device if params else None
        with torch.no_grad():
            example = torch.zeros(1, *self.input_shape, dtype=_float_dtype(params), device=device)
            forward(self, params, example, visit=lambda n, y: found.__setitem__(n.name, tuple(y.shape[1:])))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "nodes": [[n.name, n.op, list(n.inputs), dict(n.attributes)] for n in self.nodes],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Graph:
        """Inverse of ``to_json``. Raises UnsupportedGraphError for what is not ours."""
        nodes = []
        for name, op, inputs, attributes in data["nodes"]:
            if op not in OPERATORS:
                raise UnsupportedGraphError(f"operator {op!r} of node {name!r} is not one of {', '.join(OPERATORS)}")
            pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()}
            nodes.append(Node(name, op, tuple(inputs), pairs))
            if op == "quantize":
                _check_quantiser(nodes[-1])
        return Graph(tuple(nodes), tuple(data["input_shape"]))


def is_buffer(name: str) -> bool:
    """Whether a tensor is never trained: running statistics and input normalisation."""
    return name.rsplit(".", 1)[-1] in BUFFERS


def trainable(params: Params) -> Params:
    """The tensors that an optimiser may change."""
    return {k: v for k, v in params.items() if not is_buffer(k)}


def batch_norm_affine(node: Node, params: Params, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
    """Batch norm as ``y = x * scale + shift`` per channel: scale and shift, each [C].

    ``statistics`` overrides the running statistics (in training the box uses those of the clean batch, Shi et al.
    2021).
    """
    if statistics is not None and node.name in statistics:
        mean, var = statistics[node.name]
    else:
        mean, var = params[f"{node.name}.running_mean"], params[f"{node.name}.running_var"]
    scale = torch.rsqrt(var + node["eps"])
    weight, bias = params.get(f"{node.name}.weight"), params.get(f"{node.name}.bias")
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] reshaped so that it broadcasts over dimension 1 of ``like``."""
    return values.view(1, -1, *([1] * (like.dim() - 2)))


def forward(
    graph: Graph,
    params: Params,
    x: Tensor,
    *,
    statistics: Statistics | None = None,
    collect: Statistics | None = None,
    visit: Callable[[Node, Tensor], object] | None = None,
    in_place: bool = False,
) -> Tensor:
    """Logits [N, classes] of images [N, C, H, W].

    Batch norm uses running statistics; with ``statistics`` those; with ``collect`` the batch's own, which are stored
    there (differentiable). ``visit`` sees every node's output. ``in_place``: ReLUs overwrite what they alone
    read, which changes no number and saves fresh memory; not beside ``visit``.
    """
    values: dict[str, Tensor] = {}
    overwriting = _overwriting(graph) if in_place else frozenset()
    for node in graph.nodes:
        inputs = [values[i] for i in node.inputs]
        if node.op == "input":
            y = x
        elif node.op == "batch_norm" and collect is not None:
            collect[node.name] = moments(inputs[0])
            scale, shift = batch_norm_affine(node, params, collect)
            y = torch.addcmul(per_channel(shift, inputs[0]), inputs[0], per_channel(scale, inputs[0]))
        elif node.name in overwriting:
            y = inputs[0].relu_()
        else:
            y = apply_node(node, params, inputs, statistics)
        values[node.name] = y
        if visit is not None:
            visit(node, y)
    return values[graph.output.name]


def _overwriting(graph: Graph) -> frozenset[str]:
    """The ReLUs that are the only readers of an operator whose backward pass does not need its own output."""
    fresh = {n.name for n in graph.nodes if n.op in ("conv2d", "linear", "batch_norm", "scale_shift")}
    read = [name for n in graph.nodes for name in n.inputs]
    return frozenset(
        n.name for n in graph.nodes if n.op == "relu" and n.inputs[0] in fresh and read.count(n.inputs[0]) == 1
    )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance, each [C], over all dimensions but 1; differentiable."""
    if x.device.type == "cpu":
        mean, var = _Moments.apply(x)  # type: ignore[no-untyped-call]
    else:
        var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


def apply_node(node: Node, params: Params, inputs: list[Tensor], statistics: Statistics | None = None) -> Tensor:
    """Output of one node for given inputs; batch norm as in ``batch_norm_affine``."""
    x = inputs[0]
    match node.op:
        case "conv2d":
            return conv2d(node, x, params[f"{node.name}.weight"], params.get(f"{node.name}.bias"))
        case "linear":
            return F.linear(x, params[f"{node.name}.weight"], params.get(f"{node.name}.bias"))
        case "batch_norm":
            scale, shift = batch_norm_affine(node, params, statistics)
            return torch.addcmul(per_channel(shift, x), x, per_channel(scale, x))
        case "scale_shift":
            scale, shift = params[f"{node.name}.scale"], params[f"{node.name}.shift"]
            return torch.addcmul(per_channel(shift, x), x, per_channel(scale, x))
        case "relu":
            return F.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, node["slope"])
        case "max_pool2d":
            return F.max_pool2d(x, node["kernel"], node["stride"], node["padding"])
        case "avg_pool2d":
            return avg_pool2d(node, x)
        case "flatten":
            return x.flatten(1)
        case "add":
            return inputs[0] + inputs[1]
        case "quantize":
            return quantize(node, x)
    raise UnsupportedGraphError(f"operator {node.op!r} of node {node.name!r}")


def slope_of(node: Node) -> float:
    """What a ReLU or leaky ReLU multiplies negative inputs by; in [0, 1], so that it is convex and monotone.

    Raises UnsupportedGraphError for a slope outside, for which the bounds would not be sound.
    """
    slope = float(node.attributes.get("slope", 0.0))
    if not 0 <= slope <= 1:
        raise UnsupportedGraphError(f"{node.op} {node.name!r} with slope = {slope!r}; understood is 0 <= slope <= 1")
    return slope


def conv2d(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The node's convolution of ``x`` with the given tensors (its own, or their absolute values)."""
    return F.conv2d(x, weight, bias, node["stride"], node["padding"], node["dilation"], node["groups"])


def avg_pool2d(node: Node, x: Tensor) -> Tensor:
    """The node's average pooling of ``x``."""
    return F.avg_pool2d(x, node["kernel"], node["stride"], node["padding"], count_include_pad=node["count_include_pad"])


def quantize(node: Node, x: Tensor) -> Tensor:
    """``x`` as the node's codes tell it: ``(saturate(round_half_even(x / scale) + zero_point) - zero_point) * scale``.

    The gradient goes straight through, and is 0 where a code saturates. NaN stays NaN.
    """
    found: Tensor = _Staircase.apply(x, node["scale"], *code_range(node))  # type: ignore[no-untyped-call]
    return found


def code_range(node: Node) -> tuple[int, int]:
    """The smallest and largest code of a ``quantize`` node, counted from its zero point."""
    return node["low"] - node["zero_point"], node["high"] - node["zero_point"]


def _check_quantiser(node: Node) -> None:
    """Raises UnsupportedGraphError for numbers for which the bounds would not be sound."""
    scale, low, zero_point, high = (node.attributes.get(key) for key in ("scale", "low", "zero_point", "high"))
    right = isinstance(scale, float) and 0 < scale < float("inf")
    codes = [c for c in (low, zero_point, high) if isinstance(c, int)]
    if not right or len(codes) < 3 or codes != sorted(codes) or low == high:
        raise UnsupportedGraphError(
            f"quantiser {node.name!r} with {dict(node.attributes)}; expected scale > 0 and low <= zero_point <= high"
        )


class _Moments(torch.autograd.Function):
    """What ``torch.var_mean`` gives, in a fifth of its time on a CPU, and one pass backward instead of four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        count = x.numel() // len(mean)
        slope = (2.0 / count) * of_var
        return torch.addcmul(per_channel(of_mean / count - slope * mean, x), x, per_channel(slope, x))


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        units = x / scale
        ctx.save_for_backward((units >= low) & (units <= high))
        return torch.round(units).clamp(low, high) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def _float_dtype(params: Params) -> torch.dtype:
    return next((p.dtype for p in params.values() if p.is_floating_point()), torch.float32)
