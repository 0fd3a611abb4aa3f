"""ONNX layers as nodes of our graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node
from cactus_ray.errors import UnsupportedGraphError

LARGEST_VALUE = 2**28
"""Elements of any layer's output for one image: a file must not ask for a machine's whole memory."""


class Reader:
    """Translates the nodes that depend on the image, one after the other."""

    def __init__(
        self, input_name: str, input_shape: tuple[int, ...], constants: dict[str, Tensor], layers: list[onnx.NodeProto]
    ) -> None:
        self.nodes = [Node("input", "input")]
        self.params: Params = {}
        self.alias = {input_name: "input"}
        self.examples = {"input": torch.zeros(1, *input_shape)}
        self.constants = constants
        self.input_shape = input_shape
        self.direct = input_name  # the value that the last node computes, under its own name
        self.readers = Counter(name for node in layers for name in node.input)

    def graph(self, output: str, source: str) -> Graph:
        """The graph whose last node is ``output``."""
        if self.alias.get(output) != self.nodes[-1].name or len(self.nodes) == 1:
            raise UnsupportedGraphError(f"{source}: output {output!r} is not the result of the last layer")
        if len(self.examples[self.nodes[-1].name].shape) != 2:
            raise UnsupportedGraphError(f"{source}: output {output!r} is not of shape [N, classes]")
        return Graph(tuple(self.nodes), self.input_shape)

    def add(self, node: onnx.NodeProto) -> None:
        """Appends what ``node`` does. Raises UnsupportedGraphError, naming it, where we have no such operator."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        translate = _TRANSLATIONS.get(node.op_type)
        if translate is None:
            raise UnsupportedGraphError(f"operator {node.op_type!r} ({_label(node)}) is not understood")
        translate(self, node, attributes)

    # --- helpers ---

    def value(self, node: onnx.NodeProto, position: int = 0) -> str:
        name = node.input[position]
        if name not in self.alias:
            raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}): input {name!r} must depend on the image")
        return self.alias[name]

    def constant(self, node: onnx.NodeProto, position: int) -> Tensor:
        """Float32 tensor; the weights of a layer must not depend on the image."""
        name = node.input[position]
        if name not in self.constants or self.constants[name].dtype != torch.float32:
            raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}): {name!r} must be a float32 constant")
        return self.constants[name]

    def has(self, node: onnx.NodeProto, position: int) -> bool:
        return len(node.input) > position and bool(node.input[position])

    def append(
        self, node: onnx.NodeProto, op: str, inputs: tuple[str, ...],
        attributes: dict[str, Any] | None = None, tensors: Params | None = None,
    ) -> None:  # fmt: skip
        taken = {n.name for n in self.nodes}
        name = node.name if node.name and node.name not in taken else f"{op}_{len(taken)}"
        while name in taken:
            name += "_"
        ours = Node(name, op, inputs, attributes or {})
        own = {f"{name}.{k}": v.contiguous() for k, v in (tensors or {}).items()}
        if "stride" in ours.attributes:
            self.refuse_large(node, ours, own)
        self.examples[name] = apply_node(ours, own, [self.examples[i] for i in inputs])
        self.params.update(own)
        self.nodes.append(ours)
        self.alias[node.output[0]] = name
        self.direct = node.output[0]

    def refuse_large(self, node: onnx.NodeProto, ours: Node, own: Params) -> None:
        """Padding makes maps of any size out of a small file; this is asked before the memory is."""
        weight = own.get(f"{ours.name}.weight")
        shape = self.examples[ours.inputs[0]].shape
        size = shape[1] if weight is None else weight.shape[0]
        for length, pad, stride in zip(shape[2:], ours["padding"], ours["stride"], strict=True):
            size *= (length + 2 * pad) // max(1, stride) + 1
        if size > LARGEST_VALUE:
            raise UnsupportedGraphError(
                f"{node.op_type} ({_label(node)}): its output for one image would have about {size} elements; at most"
                f" {LARGEST_VALUE}"
            )

    def refuse(self, node: onnx.NodeProto, attributes: dict[str, Any], expected: dict[str, Any]) -> None:
        """Raises where an attribute has another value than the one that we understand."""
        for key, value in attributes.items():
            if key in expected and _plain(value) != _plain(expected[key]):
                raise UnsupportedGraphError(
                    f"{node.op_type} ({_label(node)}) with {key} = {_plain(value)!r}; understood is {expected[key]!r}"
                )

    # --- operators ---

    def conv(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        weight = self.constant(node, 1)
        if weight.dim() != 4:
            raise UnsupportedGraphError(
                f"Conv ({_label(node)}): weight of shape {tuple(weight.shape)}; expected 2-D kernels"
            )
        self.refuse(node, attributes, {"kernel_shape": list(weight.shape[2:])})
        window = self.window(node, attributes)
        tensors = {"weight": weight} | ({"bias": self.constant(node, 2)} if self.has(node, 2) else {})
        dilation = tuple(attributes.get("dilations", (1, 1)))
        ours = {**window, "dilation": dilation, "groups": attributes.get("group", 1)}
        self.append(node, "conv2d", (self.value(node),), ours, tensors)

    def window(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> dict[str, Any]:
        """Stride and padding; both ends of a dimension must be padded alike."""
        if (mode := _plain(attributes.get("auto_pad", "NOTSET"))) not in ("NOTSET", "VALID"):
            raise UnsupportedGraphError(
                f"{node.op_type} ({_label(node)}) with auto_pad = {mode!r}; expected explicit pads"
            )
        pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
        if len(pads) != 4 or pads[:2] != pads[2:]:
            raise UnsupportedGraphError(
                f"{node.op_type} ({_label(node)}) with pads = {list(pads)}; expected symmetric ones"
            )
        return {"stride": tuple(attributes.get("strides", (1, 1))), "padding": pads[:2]}

    def gemm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.refuse(node, attributes, {"alpha": 1.0, "beta": 1.0, "transA": 0})
        weight = self.constant(node, 1)
        weight = weight if attributes.get("transB", 0) else weight.T
        self.refuse_maps(node)
        tensors = {"weight": weight}
        if self.has(node, 2):
            tensors["bias"] = self.constant(node, 2).expand(1, weight.shape[0])[0].clone()
        self.append(node, "linear", (self.value(node),), tensors=tensors)

    def refuse_maps(self, node: onnx.NodeProto) -> None:
        shape = tuple(self.examples[self.value(node)].shape[1:])
        if len(shape) != 1:
            raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}) reads {shape}; expected flat features")

    def matmul(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        weight = self.constant(node, 1)
        if weight.dim() != 2:
            raise UnsupportedGraphError(f"MatMul ({_label(node)}): expected [N, features] times a constant matrix")
        self.refuse_maps(node)
        self.append(node, "linear", (self.value(node),), tensors={"weight": weight.T})

    def arithmetic(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        """Add of two branches, or Add and Mul by one number per channel."""
        constant = [i for i in (0, 1) if node.input[i] in self.constants]
        if not constant:
            if node.op_type != "Add":
                raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}) of two values that depend on the image")
            first, second = self.value(node, 0), self.value(node, 1)
            if self.examples[first].shape != self.examples[second].shape:
                raise UnsupportedGraphError(f"Add ({_label(node)}) of different shapes")
            self.append(node, "add", (first, second))
            return
        producer = self.value(node, 1 - constant[0])
        values = self.channels(node, self.constant(node, constant[0]), self.examples[producer])
        source = node.input[1 - constant[0]]
        only_reader = source == self.direct and self.readers[source] == 1
        if node.op_type == "Add" and only_reader and self.merge_bias(node, self.nodes[-1], values):
            return
        one, zero = torch.ones_like(values), torch.zeros_like(values)
        tensors = {"scale": values, "shift": zero} if node.op_type == "Mul" else {"scale": one, "shift": values}
        self.append(node, "scale_shift", (producer,), tensors=tensors)

    def merge_bias(self, node: onnx.NodeProto, last: Node, values: Tensor) -> bool:
        """Gives a matrix product, or a Mul by channel constants, the shift that directly follows it."""
        if last.op == "linear" and f"{last.name}.bias" not in self.params:
            self.params[f"{last.name}.bias"] = values
        elif last.op == "scale_shift" and not bool(self.params[f"{last.name}.shift"].any()):
            self.params[f"{last.name}.shift"] = values
        else:
            return False
        self.alias[node.output[0]] = last.name
        self.direct = node.output[0]
        return True

    def channels(self, node: onnx.NodeProto, values: Tensor, example: Tensor) -> Tensor:
        """A constant that broadcasts over dimension 1 of the value only, as [C]."""
        shape = (1, example.shape[1], *([1] * (example.dim() - 2)))
        padded = values.reshape((1,) * (example.dim() - values.dim()) + tuple(values.shape))
        if padded.dim() != example.dim() or any(p not in (1, s) for p, s in zip(padded.shape, shape, strict=True)):
            raise UnsupportedGraphError(
                f"{node.op_type} ({_label(node)}) with a constant of shape {tuple(values.shape)}; expected one"
                " number per channel"
            )
        return padded.expand(shape).reshape(-1).clone()

    def batch_norm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.refuse(node, attributes, {"training_mode": 0, "spatial": 1})
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = {name: self.constant(node, i) for i, name in enumerate(names, start=1)}
        ours = {"eps": attributes.get("epsilon", 1e-5), "momentum": 1.0 - attributes.get("momentum", 0.9)}
        self.append(node, "batch_norm", (self.value(node),), ours, tensors)

    def pool(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.refuse(node, attributes, {"ceil_mode": 0, "dilations": [1, 1], "storage_order": 0})
        if len(node.output) > 1 and node.output[1]:
            raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}) with indices")
        ours = {"kernel": tuple(attributes["kernel_shape"]), **self.window(node, attributes)}
        if len(ours["kernel"]) != 2:
            raise UnsupportedGraphError(f"{node.op_type} ({_label(node)}): expected a 2-D kernel")
        if node.op_type == "AveragePool":
            ours["count_include_pad"] = bool(attributes.get("count_include_pad", 0))
        self.append(node, "max_pool2d" if node.op_type == "MaxPool" else "avg_pool2d", (self.value(node),), ours)

    def global_pool(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        kernel = tuple(self.examples[self.value(node)].shape[2:])
        if len(kernel) != 2:
            raise UnsupportedGraphError(f"GlobalAveragePool ({_label(node)}): expected [N, C, H, W]")
        ours = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "count_include_pad": True}
        self.append(node, "avg_pool2d", (self.value(node),), ours)

    def flatten(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.refuse(node, attributes, {"axis": 1})
        self.append(node, "flatten", (self.value(node),))

    def reshape(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.refuse(node, attributes, {"allowzero": 0})
        target = self.constants.get(node.input[1], torch.empty(0)).tolist()
        features = self.examples[self.value(node)][0].numel()
        if target not in ([0, -1], [0, features], [-1, features]):
            raise UnsupportedGraphError(f"Reshape ({_label(node)}) to {target}; expected [-1, {features}]")
        self.append(node, "flatten", (self.value(node),))

    def relu(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        self.append(node, "relu", (self.value(node),))

    def identity(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        if (len(node.output) > 1 and node.output[1]) or self.has(node, 2):
            raise UnsupportedGraphError(f"Dropout ({_label(node)}) in training mode")
        self.alias[node.output[0]] = self.value(node)


_TRANSLATIONS = {
    "Conv": Reader.conv, "Gemm": Reader.gemm, "MatMul": Reader.matmul, "Add": Reader.arithmetic,
    "Mul": Reader.arithmetic, "BatchNormalization": Reader.batch_norm, "MaxPool": Reader.pool,
    "AveragePool": Reader.pool, "GlobalAveragePool": Reader.global_pool, "Flatten": Reader.flatten,
    "Reshape": Reader.reshape, "Relu": Reader.relu, "Identity": Reader.identity, "Dropout": Reader.identity,
}  # fmt: skip


def _label(node: onnx.NodeProto) -> str:
    return f"node {node.name!r}" if node.name else f"output {node.output[0]!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return list(value) if isinstance(value, tuple) or not isinstance(value, str | int | float | list) else value
