"""The first convolution of a network, read backward fast.

On CPUs torch's gradient of a strided convolution to an image of few channels takes three to four times its forward
pass. The same gradient is a plain convolution: output pixel ``stride * i + r`` only meets the kernel's entries of phase
``r``, so each phase is an output channel, and the phases are then woven into one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node

_FEW = 4
"""Channels of an image up to which this pays."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """The nodes up to and including the first convolution (a chain), and ``rest``, the graph behind it.

    ``phases``: the kernel by phase, as the weight [C * stride ** 2, channels, ceil(kernel / stride) ** 2] of a
    convolution. ``scale`` [C, 1, 1]: what multiplies the image in front of it.
    """

    nodes: tuple[Node, ...]
    rest: Graph
    params: Params
    phases: Tensor
    scale: Tensor | None
    size: tuple[int, int]

    @staticmethod
    def of(graph: Graph, params: Params) -> Entrance | None:
        """The entrance, or None where the graph begins otherwise or nothing is gained."""
        first = graph.weighted()[0]
        nodes = graph.nodes[: graph.nodes.index(first) + 1]
        behind = graph.nodes[len(nodes) :]
        chain = all(after.inputs == (before.name,) for before, after in pairwise(nodes))
        known = {first.name, *(node.name for node in behind)}
        if not (
            first.op == "conv2d"
            and chain
            and behind
            and all(node.op in ("input", "scale_shift", "conv2d") for node in nodes)
            and all(name in known for node in behind for name in node.inputs)
            and len(set(first["stride"])) == 1
            and first["stride"][0] > 1
            and first["dilation"] == (1, 1)
            and first["groups"] == 1
            and graph.input_shape[0] <= _FEW
        ):
            return None
        scale = None
        for node in nodes:
            if node.op == "scale_shift":
                factor = params[f"{node.name}.scale"].view(-1, 1, 1)
                scale = factor if scale is None else scale * factor
        rest = Graph((Node(first.name, "input"), *behind), graph.input_shape)
        phases = _phases(params[f"{first.name}.weight"], first["stride"][0])
        return Entrance(nodes, rest, params, phases, scale, (graph.input_shape[1], graph.input_shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        """The first convolution's output at images [N, C, H, W]; no gradient is kept."""
        with torch.no_grad():
            for node in self.nodes[1:]:
                x = apply_node(node, self.params, [x])
        return x

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient to the image [N, C, H, W] from the one to the first convolution's output."""
        first = self.nodes[-1]
        stride, padding = first["stride"][0], first["padding"]
        reach = [length - 1 for length in self.phases.shape[-2:]]
        woven = F.pixel_shuffle(F.conv2d(gradient, self.phases, padding=reach), stride)
        missing = [self.size[i] + padding[i] - woven.shape[2 + i] for i in (0, 1)]
        image = F.pad(woven, (-padding[1], missing[1], -padding[0], missing[0]))  # below 0: cut off
        return image if self.scale is None else image * self.scale


def _phases(weight: Tensor, stride: int) -> Tensor:
    """The kernel [O, C, h, w], filled up to a multiple of the stride: [C * stride ** 2, O, h / stride, w / stride]."""
    outputs, channels, *kernel = weight.shape
    filled = [-(-length // stride) for length in kernel]
    weight = F.pad(weight, (0, filled[1] * stride - kernel[1], 0, filled[0] * stride - kernel[0]))
    parted = weight.view(outputs, channels, filled[0], stride, filled[1], stride).flip(2, 4)
    return parted.permute(1, 3, 5, 0, 2, 4).reshape(channels * stride**2, outputs, *filled).contiguous()
