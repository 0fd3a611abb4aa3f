"""An ONNX file back as graph and tensors, the tensors computed by onnxruntime itself.

The nodes split in two: those that depend on constants only, which onnxruntime evaluates here exactly as it does when it
loads the file for deployment, and those that depend on the image, which become our graph. So what is certified is what
is deployed, however the file encodes its weights. What could end or stall the process is refused before (``guard``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.interchange import run
from cactus_ray.interchange.guard import constant_part, foresee, parse_model, partition
from cactus_ray.interchange.layers import LARGEST_VALUE, Reader
from cactus_ray.interchange.layouts import InputLayout, View

READABLE = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """A file as it is understood.

    ``params``: float64, exact but for the reciprocals of constants that the file divides by. ``shape``: the file's
    input with one sample in it, ``output`` its output then; our output is that, flattened. ``order`` [inputs]: flat
    entry p of our input is entry ``order[p]`` of the file's.
    """

    graph: Graph
    params: Params
    metadata: dict[str, str]
    shape: tuple[int, ...]
    output: tuple[int, ...]
    order: Tensor

    def to_file(self, points: Tensor) -> Tensor:
        """Points [N, *graph.input_shape] as the file's flat inputs [N, inputs]."""
        return torch.empty_like(points.flatten(1)).index_copy_(1, self.order, points.flatten(1))

    def from_file(self, values: Tensor) -> Tensor:
        """Inverse of ``to_file``."""
        return values[:, self.order].reshape(len(values), *self.graph.input_shape)


def read_onnx(data: bytes | Path) -> tuple[Graph, Params, dict[str, str]]:
    """Graph, tensors (float32) and metadata of an ONNX file whose input and output have a batch dimension.

    Raises as ``read_network`` does; UnsupportedGraphError as well for an input that is not read in the file's own
    layout, and for constants that float32 cannot hold.
    """
    source = _source(data)
    network = read_network(data)
    shape = tuple(network.graph.input_shape)
    if network.shape != (1, *shape) or not torch.equal(network.order, torch.arange(math.prod(shape))):
        raise UnsupportedGraphError(
            f"{source}: its layers read the input {list(network.shape)} as maps {list(shape)}; expected an input of"
            " shape [N, C, H, W]"
        )
    if len(network.output) != 2:
        raise UnsupportedGraphError(f"{source}: output {list(network.output)} is not of shape [N, classes]")
    single = {name: tensor.float() for name, tensor in network.params.items()}
    for name, tensor in network.params.items():
        if not torch.equal(single[name].double(), tensor) and bool(torch.isfinite(tensor).all()):
            raise UnsupportedGraphError(
                f"{source}: {name!r} divides by a number whose reciprocal is no float32 number; expected Mul"
            )
    return network.graph, single, network.metadata


def read_network(data: bytes | Path) -> OnnxNetwork:
    """What an ONNX file computes for one sample.

    Understood: Conv, Gemm, MatMul, Add, Sub, Mul and Div with constants, Add and Sub of two branches,
    BatchNormalization (inference), Relu, LeakyRelu, MaxPool, AveragePool, GlobalAveragePool, Identity, Dropout;
    Flatten, Reshape, Transpose, Squeeze and Unsqueeze where a layer's weights can take the order; any plain operator on
    constants, DequantizeLinear among them; QuantizeLinear and DequantizeLinear of activations with constant scales, one
    per tensor. The input is [N], [1, ...] or [batch, ...] with a free batch size. Raises
    UnsupportedGraphError that names anything else, UserError for a file that is missing, broken or keeps tensors in
    other files.
    """
    source = _source(data)
    if isinstance(data, Path):
        try:
            data = data.read_bytes()
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror}); expected an ONNX file") from error
    model = parse_model(data, source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    constants = _initializers(model, source)
    name, shape, dynamic = _input(model, constants, source)
    fixed, layers = partition(model.graph, set(constants), source)
    makers = {name: node for node in fixed for name in node.output}
    wanted = {i for node in layers for i in node.input}
    if any(node.op_type == "QuantizeLinear" for node in layers):  # then codes of weights matter, too
        wanted |= {i for name in wanted & makers.keys() for i in makers[name].input}
    constants |= _evaluate(model, fixed, wanted, source)
    order = torch.arange(math.prod(shape))
    inside = tuple(shape[1:]) if len(shape) > 1 else shape
    try:
        try:
            reader = Reader(
                name, View("input", order.view(shape)), inside, constants, layers, dynamic=dynamic, makers=makers
            )
            for node in layers:
                reader.add(node)
        except InputLayout as wanted:
            order = wanted.order
            view = View("input", order.argsort().view(shape))
            reader = Reader(name, view, wanted.shape, constants, layers, dynamic=dynamic, makers=makers)
            for node in layers:
                reader.add(node)
    except InputLayout as error:
        raise UnsupportedGraphError(f"{source}: {error}") from error
    except UnsupportedGraphError as error:
        raise UnsupportedGraphError(f"{source}: {error}") from error
    graph = reader.graph(model.graph.output[0].name, source)
    output = tuple(reader.views[model.graph.output[0].name].index.shape)
    return OnnxNetwork(graph, reader.params, metadata, shape, output, order)


def _source(data: bytes | Path) -> str:
    return str(data) if isinstance(data, Path) else "the ONNX file"


def _initializers(model: onnx.ModelProto, source: str) -> dict[str, Tensor]:
    """The constants of the file of types that layers read; the others only serve to compute these."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.name in found:
            raise UserError(f"{source}: two initialisers are named {tensor.name!r}")
        if any(d < 0 for d in tensor.dims):
            raise UserError(f"{source}: initialiser {tensor.name!r} has the shape {list(tensor.dims)}")
        try:
            found[tensor.name] = _tensor(tensor)
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}: initialiser {tensor.name!r} is damaged ({error})") from error
    return found


def _tensor(tensor: TensorProto) -> Tensor:
    if tensor.data_type not in READABLE:
        return torch.empty(0, dtype=torch.uint8)  # known to be constant, never read by a layer
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _evaluate(model: onnx.ModelProto, nodes: list[onnx.NodeProto], wanted: set[str], source: str) -> dict[str, Tensor]:
    """Values that onnxruntime computes for the outputs of constant nodes that layers read."""
    part = constant_part(model, nodes)
    known = foresee(part, source)
    outputs = [name for node in nodes for name in node.output if name in wanted]
    if not outputs:
        return {}
    for name in outputs:
        part.graph.output.append(helper.make_tensor_value_info(name, known.get(name, TensorProto.FLOAT), None))
    values = run.run(run.session(part.SerializeToString(), source), {}, source)
    try:
        return {name: torch.from_numpy(value.copy()) for name, value in zip(outputs, values, strict=True)}
    except TypeError as error:
        raise UserError(f"{source}: a constant of a layer has a type that layers cannot read ({error})") from error


def _input(model: onnx.ModelProto, constants: dict[str, Tensor], source: str) -> tuple[str, tuple[int, ...], bool]:
    """Name of the input, its shape with one sample in it, and whether the batch size is free."""
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise UnsupportedGraphError(f"{source}: inputs {[v.name for v in inputs]}; expected one, of float32 images")
    dims = inputs[0].type.tensor_type.shape.dim
    given = [d.dim_value or d.dim_param or "?" for d in dims]
    dynamic = len(dims) > 1 and not dims[0].HasField("dim_value")
    shape = (1, *(d.dim_value for d in dims[1:])) if dynamic else tuple(d.dim_value for d in dims)
    if not shape or any(d <= 0 for d in shape) or math.prod(shape) > LARGEST_VALUE or (len(shape) > 1 and shape[0] > 1):
        raise UnsupportedGraphError(
            f"{source}: input {inputs[0].name!r} is {given}; expected one sample, such as [N, C, H, W] with numbers"
            " after the batch size, [1, features] or [features]"
        )
    return inputs[0].name, shape, dynamic
