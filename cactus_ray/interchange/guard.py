"""What must hold of an ONNX file before a runtime opens it: nothing in it can end or stall the process.

onnxruntime computes constants while it loads a file. An integer division by zero, or of -2**63 by -1, ends the process
there with a signal that no ``except`` sees; a few bytes can ask for terabytes of memory or years of products. So
constants are understood first: by which operators, how large, of which type, and what integers are divided by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.interchange.arithmetic import label

CONSTANT_OPERATORS = (
    "Add", "BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum",
    "DequantizeLinear", "Div", "Flatten", "Gather", "Identity", "MatMul", "Mod", "Mul", "Neg", "QuantizeLinear",
    "ReduceSum", "Reshape", "ScatterElements", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    "Where",
)  # fmt: skip
"""What may compute a constant: plain tensor operators, nothing with a body, a file, a state or randomness."""
OLDEST_OPSET = 9
"""Before it, operators broadcast and normalise differently."""
MOST_NODES = 20_000
LARGEST_CONSTANT = 2**30
"""Elements of any constant while it is computed: a small file must not ask for a machine's whole memory."""
LARGEST_CONSTANTS = 2**32
"""Bytes of all computed constants together."""
MOST_PRODUCTS = 2**36
"""Multiplications of all products of constants together; some ten seconds of one thread."""
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

Shape = tuple[int, ...]


def parse_model(data: bytes, source: str) -> onnx.ModelProto:
    """The file as a message of plain ONNX operators, whose tensors all lie inside.

    Raises UserError for what is no ONNX file or a damaged one, UnsupportedGraphError for operators of other domains,
    functions, operators with a body (If, Loop, Scan), several outputs, and more than ``MOST_NODES`` nodes.
    """
    try:
        model = onnx.load_model_from_string(data)
        if len(model.graph.node) > MOST_NODES:
            raise UnsupportedGraphError(f"{source}: {len(model.graph.node)} nodes; expected at most {MOST_NODES}")
        for node in model.graph.node:
            if any(_has_body(attribute) for attribute in node.attribute):
                raise UnsupportedGraphError(f"{source}: operator {node.op_type!r} ({label(node)}) has a body of nodes")
        stored_elsewhere = [t.name for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
        if stored_elsewhere:
            raise UserError(
                f"{source}: tensor {stored_elsewhere[0]!r} lies in another file; expected all tensors inside"
            )
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: not an ONNX file, or a damaged one ({reason})") from error
    domains = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if domains or len(model.functions):
        raise UnsupportedGraphError(
            f"{source}: operators outside plain ONNX ({', '.join(sorted(domains)) or 'functions'})"
        )
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if version < OLDEST_OPSET:
        raise UnsupportedGraphError(f"{source}: opset {version}; expected {OLDEST_OPSET} or newer")
    if len(model.graph.output) != 1:
        raise UnsupportedGraphError(f"{source}: {len(model.graph.output)} outputs; expected one, the logits")
    if len(model.graph.sparse_initializer):
        raise UnsupportedGraphError(f"{source}: sparse initialisers are not understood")
    return model


def runnable(data: bytes, source: str) -> bytes:
    """The file as a runtime may open it: without the nodes and tensors that its output does not need.

    Unneeded ones change no answer, but a runtime computes them. Where there are none, these are the file's own bytes.
    Raises as ``parse_model``, ``partition`` and ``foresee`` do.
    """
    model = parse_model(data, source)
    fixed = partition(model.graph, {t.name for t in model.graph.initializer}, source)[0]
    foresee(constant_part(model, fixed), source)
    nodes = _needed(model.graph)
    read = {name for node in nodes for name in node.input} | {model.graph.output[0].name}
    tensors = [t for t in model.graph.initializer if t.name in read]
    if len(nodes) == len(model.graph.node) and len(tensors) == len(model.graph.initializer):
        return data
    needed = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    needed.graph.name = "needed"
    needed.graph.node.extend(nodes)
    needed.graph.initializer.extend(tensors)
    # old files list their tensors among the inputs
    dropped = {t.name for t in model.graph.initializer} - read
    needed.graph.input.extend(value for value in model.graph.input if value.name not in dropped)
    needed.graph.output.extend(model.graph.output)
    return bytes(needed.SerializeToString())


def partition(
    graph: onnx.GraphProto, constants: set[str], source: str
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The needed nodes, in order: those that depend on constants only, and those that depend on the image.

    ``constants``: names of the file's tensors. Raises UnsupportedGraphError where another operator than
    ``CONSTANT_OPERATORS`` computes a constant.
    """
    known, fixed, layers = set(constants), [], []
    for node in _needed(graph):
        if all(name in known or not name for name in node.input):
            if node.op_type not in CONSTANT_OPERATORS:
                raise UnsupportedGraphError(f"{source}: operator {node.op_type!r} ({label(node)}) on constants")
            known.update(node.output)
            fixed.append(node)
        else:
            layers.append(node)
    return fixed, layers


def constant_part(model: onnx.ModelProto, fixed: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A model of these nodes alone, without outputs."""
    read = {name for node in fixed for name in node.input}
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "constants"
    part.graph.node.extend(fixed)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in read)
    return part


def foresee(part: onnx.ModelProto, source: str) -> dict[str, int]:
    """Element types of all computed constants, by name; nothing is computed.

    Raises UserError that names the node where sizes or the work are huge or cannot be foreseen, UnsupportedGraphError
    for a division of integers by anything but constants of the file that are all positive.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(part, strict_mode=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError) as error:
        raise UserError(f"{source}: its constants do not fit together ({' '.join(str(error).split())})") from error
    values = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in part.graph.initializer}
    known = {t.name: t for t in part.graph.initializer}
    found: dict[str, int] = {}
    total = products = 0
    for node in part.graph.node:
        for name in filter(None, node.output):
            shapes[name] = _size(name, node, values, source)
            found[name] = values[name].elem_type
            total += math.prod(shapes[name]) * _bytes_of(found[name])
        if total > LARGEST_CONSTANTS:
            raise UserError(
                f"{source}: constants up to {_what(node)} would have {total} bytes; at most {LARGEST_CONSTANTS}"
            )
        match node.op_type:
            case "MatMul":
                products += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[0]][-1:])
            case "Constant":
                known.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
            case "Div" | "Mod" if found[node.output[0]] not in _FLOATS:
                _refuse_trap(node, known, source)
        if products > MOST_PRODUCTS:
            raise UserError(
                f"{source}: constants up to {_what(node)} would take {products} multiplications; at most"
                f" {MOST_PRODUCTS}"
            )
    return found


def _size(name: str, node: onnx.NodeProto, values: Mapping[str, onnx.TypeProto.Tensor], source: str) -> Shape:
    """The shape of a constant that ``node`` computes. UserError where it is huge or not known."""
    dims = values[name].shape.dim if name in values and values[name].HasField("shape") else None
    if dims is None or not all(d.HasField("dim_value") and d.dim_value >= 0 for d in dims):
        raise UserError(f"{source}: the size of the constant {name!r} ({_what(node)}) cannot be foreseen")
    shape = tuple(d.dim_value for d in dims)
    if (size := math.prod(shape)) > LARGEST_CONSTANT:
        raise UserError(
            f"{source}: constant {name!r} ({_what(node)}) would have {size} elements; at most {LARGEST_CONSTANT}"
        )
    return shape


def _refuse_trap(node: onnx.NodeProto, tensors: Mapping[str, TensorProto], source: str) -> None:
    """Raises UnsupportedGraphError unless integers are divided by known positive ones: by 0 and -1 a CPU may trap."""
    divisor = tensors.get(node.input[1])
    try:
        values = None if divisor is None else np.asarray(numpy_helper.to_array(divisor))
    except (ValueError, TypeError):
        values = None
    if values is None:
        reason = f"by {node.input[1]!r}, which is computed"
    elif not bool((values > 0).all()):
        reason = f"by {node.input[1]!r}, which holds {values[values <= 0].flat[0]}"
    else:
        return
    raise UnsupportedGraphError(
        f"{source}: {_what(node)} divides integers {reason}; expected positive constants of the file: a division by 0"
        " or -1 may end the process"
    )


def _bytes_of(kind: int) -> int:
    """Of one element; of a type that numpy does not have, the most that one has."""
    try:
        return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)
    except KeyError:
        return 16


def _what(node: onnx.NodeProto) -> str:
    return f"operator {node.op_type!r}, {label(node)}"


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes on which the output depends, in the file's order (which the checker found topological)."""
    wanted, found = {graph.output[0].name}, []
    for node in reversed(graph.node):
        if any(name in wanted for name in node.output if name):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def _tensors(model: onnx.ModelProto) -> Iterable[TensorProto]:
    """Every tensor of a file without bodies, whatever the type of its attribute is said to be."""
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (a for node in model.graph.node for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
                       *attribute.sparse_tensors):  # fmt: skip
            yield from (sparse.values, sparse.indices)


def _has_body(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("g") or len(attribute.graphs) > 0
