"""A graph as a torch module: what libraries read that know nothing of our graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Node, Params, slope_of
from cactus_ray.errors import UnsupportedGraphError


class GraphModule(nn.Module):
    """The graph out of torch's own layers, in evaluation, with detached tensors of the same dtype and device.

    Node ``skip`` does nothing. Average pooling with uncounted padding is written so that auto_LiRPA understands it.
    Raises UnsupportedGraphError for an operator that has no layer.
    """

    def __init__(self, graph: Graph, params: Params, skip: Node | None = None) -> None:
        super().__init__()
        self.structure = [(n.name, n.inputs) for n in graph.nodes]
        self.layers = nn.ModuleList([nn.Identity() if n == skip else _layer(n, params, graph) for n in graph.nodes])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        values: dict[str, Tensor] = {}
        for (name, inputs), layer in zip(self.structure, self.layers, strict=True):
            x = layer(*(values[i] for i in inputs)) if inputs else x
            values[name] = x
        return x


class _Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _ScaleShift(nn.Module):
    """``x * scale + shift``; scale and shift broadcast against [N, ...]."""

    scale: Tensor
    shift: Tensor | None

    def __init__(self, scale: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return y if self.shift is None else y + self.shift


def _avg_pool(node: Node, params: Params, graph: Graph) -> nn.Module:
    """auto_LiRPA always counts the padding; where we do not, its mean is corrected by a factor per place."""
    pool = nn.AvgPool2d(node["kernel"], node["stride"], node["padding"])
    if node["count_include_pad"] or not any(node["padding"]):
        return pool
    shape = graph.shapes(params)[node.inputs[0]]
    like = next(t for t in params.values() if t.is_floating_point())
    ones = torch.ones(1, 1, *shape[1:], dtype=like.dtype, device=like.device)
    return nn.Sequential(pool, _ScaleShift(1 / pool(ones)))


def _layer(node: Node, params: Params, graph: Graph) -> nn.Module:
    own = {k.rsplit(".", 1)[1]: v.detach() for k, v in params.items() if k.rsplit(".", 1)[0] == node.name}
    layer: nn.Module
    match node.op:
        case "input":
            return nn.Identity()
        case "relu":
            return nn.ReLU()
        case "leaky_relu":
            return nn.LeakyReLU(slope_of(node))
        case "flatten":
            return nn.Flatten()
        case "add":
            return _Add()
        case "scale_shift":
            shape = (1, -1, *([1] * (len(graph.shapes(params)[node.name]) - 1)))
            return _ScaleShift(own["scale"].view(shape), own["shift"].view(shape))
        case "max_pool2d":
            return nn.MaxPool2d(node["kernel"], node["stride"], node["padding"])
        case "avg_pool2d":
            return _avg_pool(node, params, graph)
        case "conv2d":
            weight = own["weight"]
            inputs, kernel = weight.shape[1] * node["groups"], (weight.shape[2], weight.shape[3])
            layer = nn.Conv2d(
                inputs, weight.shape[0], kernel, node["stride"], node["padding"],
                node["dilation"], node["groups"], bias="bias" in own,
            )  # fmt: skip
        case "linear":
            layer = nn.Linear(own["weight"].shape[1], own["weight"].shape[0], bias="bias" in own)
        case "batch_norm":
            kind = nn.BatchNorm2d if len(graph.shapes(params)[node.name]) == 3 else nn.BatchNorm1d
            layer = kind(len(own["running_mean"]), eps=node["eps"], affine="weight" in own)
        case _:
            raise UnsupportedGraphError(f"operator {node.op!r} of node {node.name!r} has no layer")
    like = next(iter(own.values()))
    layer.to(like.device, like.dtype).load_state_dict(own, strict=False)
    return layer
