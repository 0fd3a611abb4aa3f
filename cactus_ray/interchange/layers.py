"""ONNX layers as nodes of our graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node
from cactus_ray.bounds.quantizer import LAYOUT, refuse_twice
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.arithmetic import label, plain
from cactus_ray.interchange.codes import CODE_LAYOUT
from cactus_ray.interchange.layouts import InputLayout, View
from cactus_ray.interchange.operators import TRANSLATIONS

LARGEST_VALUE = 2**26
"""Elements of any layer's output for one image: a file must not ask for a machine's whole memory."""
LARGEST_VALUES = 2 * LARGEST_VALUE
"""Elements of all layers' outputs for one image together."""

_ANY_LAYOUT = {"input", "flatten", "scale_shift", "relu", "leaky_relu", "quantize"}
_REASONS = {
    "DynamicQuantizeLinear": "its scale depends on the image; only static scales are certified",
}


class Reader:
    """Translates the nodes that depend on the image, one after the other; all tensors in float64.

    Reshape, Transpose and their like only change how a value is read (``View``); a layer that reads it takes the order
    into its weights, or asks for another layout of the network's input (``InputLayout``).
    """

    def __init__(
        self, name: str, view: View, input_shape: tuple[int, ...], constants: dict[str, Tensor],
        layers: list[onnx.NodeProto], *, dynamic: bool, makers: dict[str, onnx.NodeProto],
    ) -> None:  # fmt: skip
        self.nodes = [Node("input", "input")]
        self.params: Params = {}
        self.views = {name: view}
        self.examples = {"input": torch.zeros(1, *input_shape, dtype=torch.float64)}
        self.constants = constants
        self.input_shape = input_shape
        self.dynamic = dynamic
        self.flatten_names: dict[str, str] = {}  # by node of ours: what the file calls its flattening
        self.codes: dict[str, Node] = {}  # values that are codes, and the quantiser that wrote them
        self.decoded: set[str] = set()  # values that DequantizeLinear made of codes
        self.makers = makers  # by constant: the node of the file that computes it
        self.elements = 0  # of all values so far
        self.direct = name  # the value that the last node computes, under its own name
        self.readers = Counter(name for node in layers for name in node.input)

    def graph(self, output: str, source: str) -> Graph:
        """The graph whose last node is ``output``, flattened to [N, classes]."""
        view = self.views.get(output)
        if view is None or view.node != self.nodes[-1].name or len(self.nodes) == 1:
            raise UnsupportedGraphError(f"{source}: output {output!r} is not the result of the last layer")
        if not view.in_order:
            raise UnsupportedGraphError(f"{source}: output {output!r} is a transposed value")
        if output in self.codes:
            raise UnsupportedGraphError(f"{source}: output {output!r} are codes; expected DequantizeLinear behind them")
        self.flat(view.node)
        graph = Graph(tuple(self.nodes), self.input_shape)
        refuse_twice(graph)
        return graph

    def add(self, node: onnx.NodeProto) -> None:
        """Appends what ``node`` does.

        Raises UnsupportedGraphError, naming it, where we have no such operator or it does not fit what it reads.
        """
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        translate = TRANSLATIONS.get(node.op_type)
        if translate is None:
            reason = _REASONS.get(node.op_type, "is not understood")
            raise UnsupportedGraphError(f"operator {node.op_type!r} ({label(node)}): {reason}")
        codes = [self.codes[i] for i in node.input if i in self.codes]
        if codes and node.op_type not in (*CODE_LAYOUT, "DequantizeLinear"):
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}) on the codes of {codes[0].name!r}; expected DequantizeLinear before it"
            )
        try:
            translate(self, node, attributes)
        except (RuntimeError, IndexError, KeyError, ValueError, TypeError, ArithmeticError) as error:
            # shapes, or values of attributes, that no layer has
            reason = " ".join(str(error).split())
            raise UnsupportedGraphError(
                f"its layers do not fit together at operator {node.op_type!r} ({label(node)}): {reason}"
            ) from error
        if codes and node.op_type in CODE_LAYOUT:
            self.codes[node.output[0]] = codes[0]

    # --- helpers ---

    def value(self, node: onnx.NodeProto, position: int = 0) -> View:
        name = node.input[position]
        if name not in self.views:
            raise UnsupportedGraphError(f"{node.op_type} ({label(node)}): input {name!r} must depend on the image")
        return self.views[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our nodes for one sample."""
        return tuple(self.examples[name].shape[1:])

    def constant(self, node: onnx.NodeProto, position: int) -> Tensor:
        """Float64 copy of a float32 tensor; the weights of a layer must not depend on the image."""
        name = node.input[position]
        if name not in self.constants or self.constants[name].dtype != torch.float32:
            raise UnsupportedGraphError(f"{node.op_type} ({label(node)}): {name!r} must be a float32 constant")
        return self.constants[name].double()

    def integers(self, node: onnx.NodeProto, attributes: dict[str, Any], key: str) -> list[int] | None:
        """A list that older opsets give as an attribute and newer ones as a constant; None: not given."""
        if key in attributes:
            return [int(v) for v in attributes[key]]
        if not self.has(node, 1):
            return None
        if node.input[1] not in self.constants:
            raise UnsupportedGraphError(f"{node.op_type} ({label(node)}): {node.input[1]!r} must be a constant")
        return [int(v) for v in self.constants[node.input[1]].flatten().tolist()]

    def has(self, node: onnx.NodeProto, position: int) -> bool:
        return len(node.input) > position and bool(node.input[position])

    def append(
        self, node: onnx.NodeProto, op: str, inputs: tuple[str, ...], attributes: dict[str, Any] | None = None,
        tensors: Params | None = None, index: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One more node of ours. ``index``: see View; by default the value is [1, *its shape] in order."""
        name = self.fresh(node.name or f"{op}_{len(self.nodes)}")
        ours = Node(name, op, inputs, attributes or {})
        own = {f"{name}.{k}": v.contiguous() for k, v in (tensors or {}).items()}
        if "stride" in ours.attributes:
            self.refuse_large(node, ours, own)
        y = apply_node(ours, own, [self.examples[i] for i in inputs])
        self.elements += y.numel()
        if self.elements > LARGEST_VALUES:
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}): the layers up to it have {self.elements} outputs for one image; at"
                f" most {LARGEST_VALUES}"
            )
        self.examples[name] = y
        self.params.update(own)
        self.nodes.append(ours)
        self.views[node.output[0]] = View(name, torch.arange(y.numel()).view(y.shape) if index is None else index)
        self.direct = node.output[0]

    def fresh(self, name: str) -> str:
        while name in self.examples:  # by name of every node of ours
            name += "_"
        return name

    def flat(self, name: str) -> str:
        """The node of ours, or one that flattens it."""
        if len(self.shape(name)) == 1:
            return name
        for node in self.nodes:
            if node.op == "flatten" and node.inputs == (name,):
                return node.name
        ours = Node(self.fresh(self.flatten_names.get(name) or f"flatten_{len(self.nodes)}"), "flatten", (name,))
        self.examples[ours.name] = self.examples[name].flatten(1)
        self.nodes.append(ours)
        return ours.name

    def map(self, node: onnx.NodeProto) -> str:
        """Our node whose value [C, H, W] the layer reads in order."""
        view = self.value(node)
        if view.index.dim() != 4 or view.index.shape[0] != 1:
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}) reads {tuple(view.index.shape)}; expected [N, C, H, W]"
            )
        if view.in_order and self.shape(view.node) == tuple(view.index.shape[1:]):
            return view.node
        reason = (
            f"{node.op_type} ({label(node)}) reads {self.shape(view.node)} of node {view.node!r} reshaped or"
            f" transposed to {tuple(view.index.shape[1:])}; maps may only be rearranged in front of all layers"
        )
        if all(n.op in _ANY_LAYOUT for n in self.nodes):
            raise InputLayout(reason, tuple(view.index.shape[1:]), view.index.flatten())
        raise UnsupportedGraphError(reason)

    def quantiser(self, name: str) -> Node | None:
        """The quantiser behind a node of ours where nothing but layout lies between."""
        nodes = {n.name: n for n in self.nodes}
        node = nodes[name]
        while node.op in LAYOUT:
            node = nodes[node.inputs[0]]
        return node if node.op == "quantize" else None

    def refuse_large(self, node: onnx.NodeProto, ours: Node, own: Params) -> None:
        """Padding makes maps of any size out of a small file; this is asked before the memory is."""
        weight = own.get(f"{ours.name}.weight")
        shape = self.examples[ours.inputs[0]].shape
        size = shape[1] if weight is None else weight.shape[0]
        for length, pad, stride in zip(shape[2:], ours["padding"], ours["stride"], strict=True):
            size *= (length + 2 * pad) // max(1, stride) + 1
        if size > LARGEST_VALUE:
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}): its output for one image would have about {size} elements; at most"
                f" {LARGEST_VALUE}"
            )

    def refuse(self, node: onnx.NodeProto, attributes: dict[str, Any], expected: dict[str, Any]) -> None:
        """Raises where an attribute has another value than the one that we understand."""
        for key, value in attributes.items():
            if key in expected and plain(value) != plain(expected[key]):
                raise UnsupportedGraphError(
                    f"{node.op_type} ({label(node)}) with {key} = {plain(value)!r}; understood is {expected[key]!r}"
                )
