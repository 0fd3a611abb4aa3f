"""The first convolution of a network, read backward fast.

On CPUs torch's gradient of a convolution to an image of few channels takes three to eight times its forward pass. It
is also a matrix product, which gives what every output adds to the pixels of its patch, and a sum over patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node

_FEW = 4
"""Channels of an image up to which this pays; without a stride it does for one."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """The nodes up to and including the first convolution (a chain), and ``rest``, the graph behind it.

    ``spread`` [C * height * width of the kernel, channels]: from an output to its patch. ``scale`` [C, 1, 1]: what
    multiplies the image in front of the convolution.
    """

    nodes: tuple[Node, ...]
    rest: Graph
    params: Params
    spread: Tensor
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
            and first["groups"] == 1
            and graph.input_shape[0] <= (1 if first["stride"] == (1, 1) else _FEW)
        ):
            return None
        scale = None
        for node in nodes:
            if node.op == "scale_shift":
                factor = params[f"{node.name}.scale"].view(-1, 1, 1)
                scale = factor if scale is None else scale * factor
        rest = Graph((Node(first.name, "input"), *behind), graph.input_shape)
        spread = params[f"{first.name}.weight"].flatten(1).t().contiguous()
        return Entrance(nodes, rest, params, spread, scale, (graph.input_shape[1], graph.input_shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        """The first convolution's output at images [N, C, H, W]; no gradient is kept."""
        with torch.no_grad():
            for node in self.nodes[1:]:
                x = apply_node(node, self.params, [x])
        return x

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient to the image [N, C, H, W] from the one to the first convolution's output."""
        first = self.nodes[-1]
        kernel = self.params[f"{first.name}.weight"].shape[2:]
        patches = torch.matmul(self.spread, gradient.flatten(2))
        image = F.fold(patches, self.size, kernel, first["dilation"], first["padding"], first["stride"])
        return image if self.scale is None else image * self.scale
