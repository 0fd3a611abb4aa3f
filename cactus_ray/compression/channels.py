"""Which channels of a network live and die together.

A removable channel is a row of every convolution or linear layer that produces it, an entry of every batch norm on its
way, and a column (a block of H*W columns after flatten) of every layer that reads it. Producers whose outputs meet in
an addition share their channels; so do the two sides of a depthwise convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.errors import UnsupportedGraphError


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """``size`` channels that are kept or removed together.

    producers: names of the layers whose output rows they are; affine: batch norms and scale_shifts over them;
    consumers: layers whose input columns they are. A tensor dimension of ``size * b`` entries holds ``b`` contiguous
    entries per channel.
    """

    size: int
    producers: tuple[str, ...]
    affine: tuple[str, ...]
    consumers: tuple[str, ...]


def is_depthwise(node: Node, params: Params) -> bool:
    """Whether every output channel reads exactly the input channel of its own number."""
    return node.op == "conv2d" and node["groups"] == params[f"{node.name}.weight"].shape[0] > 1


def channel_groups(graph: Graph, params: Params) -> tuple[ChannelGroup, ...]:
    """All removable groups, in the order of their first producer; never the image's channels nor the classes.

    Raises UnsupportedGraphError, naming the layer, for a convolution with groups that is not depthwise: its groups must
    stay of equal size.
    """
    spaces = _Spaces(graph, params)
    found = []
    for root in spaces.roots():
        producers = [n.name for n in graph.weighted() if spaces.find(n.name) == root]
        affine = [
            n.name
            for n in graph.nodes
            if n.op in ("batch_norm", "scale_shift") and spaces.find(n.name) == root
        ]  # fmt: skip
        consumers = [
            n.name
            for n in graph.weighted()
            if spaces.find(n.inputs[0]) == root and not is_depthwise(n, params)
        ]  # fmt: skip
        found.append(ChannelGroup(spaces.size[producers[0]], tuple(producers), tuple(affine), tuple(consumers)))
    return tuple(found)


class _Spaces:
    """Union-find over nodes: two nodes are joined when their outputs carry the same channels."""

    def __init__(self, graph: Graph, params: Params) -> None:
        self.parent = {n.name: n.name for n in graph.nodes}
        self.size: dict[str, int] = {}  # channels before any flatten
        fixed = [graph.output.name]
        for node in graph.nodes:
            if node.op == "input":
                self.size[node.name] = graph.input_shape[0]
                fixed.append(node.name)
            elif node.op in ("conv2d", "linear"):
                self.size[node.name] = params[f"{node.name}.weight"].shape[0]
                if is_depthwise(node, params):
                    self._join(node.name, node.inputs[0])
                elif node.op == "conv2d" and node["groups"] != 1:
                    raise UnsupportedGraphError(
                        f"conv2d {node.name!r} has {node['groups']} groups: structured pruning handles ordinary and"
                        " depthwise convolutions only"
                    )
            elif node.op == "add":
                first, second = node.inputs
                self.size[node.name] = self.size[first]
                self._join(node.name, first)
                if self.size[first] != self.size[second]:  # added after a flatten of one side, or by broadcasting
                    fixed += [first, second]
                else:
                    self._join(first, second)
            else:
                self.size[node.name] = self.size[node.inputs[0]]
                self._join(node.name, node.inputs[0])
        self.fixed = {self.find(name) for name in fixed}
        self.order = [n.name for n in graph.weighted()]

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def _join(self, first: str, second: str) -> None:
        self.parent[self.find(first)] = self.find(second)

    def roots(self) -> list[str]:
        return [root for root in dict.fromkeys(self.find(name) for name in self.order) if root not in self.fixed]
