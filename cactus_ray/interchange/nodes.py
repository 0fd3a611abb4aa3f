"""The part of an ONNX file that depends on the image: one node, or a few, per node of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cactus_ray.bounds.graph import Node
from cactus_ray.bounds.quantizer import LAYOUT
from cactus_ray.compression.materialize import Compressed
from cactus_ray.errors import UnsupportedGraphError

if TYPE_CHECKING:
    from cactus_ray.interchange.write import Builder

INPUT, OUTPUT = "image", "logits"


def write_layers(builder: Builder, compressed: Compressed) -> int:
    """The nodes that depend on the image. Returns the number of classes."""
    graph = compressed.graph
    shapes = graph.shapes(compressed.params)
    value = {graph.nodes[0].name: INPUT}
    codes = _Codes(builder, value)
    for node in graph.nodes[1:]:
        if codes.takes(node):
            continue
        inputs = [codes.decoded(name) for name in node.inputs]
        output = value[node.name] = OUTPUT if node is graph.output else builder.fresh()
        if node.op == "scale_shift":
            channels = (-1, *([1] * (len(shapes[node.name]) - 1)))
            for op, suffix, name, result in (("Mul", "scale", node.name, None), ("Add", "shift", None, output)):
                shape = builder.constant(np.array(channels))
                constant = builder.add("Reshape", [f"{node.name}.{suffix}", shape])
                inputs = [builder.add(op, [*inputs, constant], result, name=name)]
            continue
        if node.op == "linear" and len(shapes[node.inputs[0]]) != 1:
            raise UnsupportedGraphError(f"linear {node.name!r} reads {shapes[node.inputs[0]]}; expected flat features")
        tensors = [k for k in (f"{node.name}.weight", f"{node.name}.bias") if k in compressed.stored]
        op, attributes = operator(node)
        builder.add(op, [*inputs, *tensors], output, name=node.name, **attributes)
    return shapes[graph.output.name][0]


class _Codes:
    """Values that lie in the file as codes, and how to read them back; layout works on the codes themselves.

    A layer reads them through a DequantizeLinear right in front of it: only then does onnxruntime compute in integers.
    ``value``: what the file calls each node's value.
    """

    def __init__(self, builder: Builder, value: dict[str, str]) -> None:
        self.builder, self.value = builder, value
        self.scales: dict[str, list[str]] = {}  # names of scale and zero point, by node of ours

    def takes(self, node: Node) -> bool:
        """Writes a quantiser, or a node of layout behind one; False for any other node."""
        source = node.inputs[0]
        if node.op == "quantize":
            kind = np.uint8 if node["low"] == 0 else np.int8
            scale = self.builder.constant(np.array(node["scale"], np.float32))
            self.scales[node.name] = [scale, self.builder.constant(np.array(node["zero_point"], kind))]
            inputs = [self.decoded(source), *self.scales[node.name]]
            self.value[node.name] = self.builder.add("QuantizeLinear", inputs, name=node.name)
        elif node.op in LAYOUT and source in self.scales:
            self.scales[node.name] = self.scales[source]
            op, attributes = operator(node)
            self.value[node.name] = self.builder.add(op, [self.value[source]], name=node.name, **attributes)
        else:
            return False
        return True

    def decoded(self, name: str) -> str:
        """A node's value as floating-point numbers."""
        if name not in self.scales:
            return self.value[name]
        return self.builder.add("DequantizeLinear", [self.value[name], *self.scales[name]])


def operator(node: Node) -> tuple[str, dict[str, Any]]:
    """ONNX operator and attributes of one node; defaults are left out."""
    match node.op:
        case "conv2d":
            attributes = {
                "strides": node["stride"], "pads": (*node["padding"], *node["padding"]),
                "dilations": node["dilation"], "group": node["groups"],
            }  # fmt: skip
            defaults = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
            return "Conv", {k: v for k, v in attributes.items() if v != defaults[k]}
        case "linear":
            return "Gemm", {"transB": 1}
        case "max_pool2d" | "avg_pool2d":
            attributes = {
                "kernel_shape": node["kernel"], "strides": node["stride"], "pads": (*node["padding"], *node["padding"]),
            }  # fmt: skip
            if node.op == "max_pool2d":
                return "MaxPool", attributes
            return "AveragePool", {**attributes, "count_include_pad": int(node["count_include_pad"])}
        case "leaky_relu":
            return "LeakyRelu", {"alpha": node["slope"]}
        case "relu" | "flatten" | "add":
            return node.op.capitalize(), {}
    raise UnsupportedGraphError(f"operator {node.op!r} of node {node.name!r} cannot be written")
