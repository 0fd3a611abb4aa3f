"""What each ONNX operator becomes: one function per operator, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Node, batch_norm_affine
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.arithmetic import Attributes, affine, arithmetic, label, plain
from cactus_ray.interchange.codes import (
    dequantize_linear,
    quantize_linear,
    refuse_inexact,
    refuse_rounded_inputs,
)
from cactus_ray.interchange.layouts import View, flattened, permuted, reshaped, squeezed, unsqueezed

if TYPE_CHECKING:
    from cactus_ray.interchange.layers import Reader

# --- convolutions and pooling ---


def _conv(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    weight = reader.constant(node, 1)
    if weight.dim() != 4:
        raise UnsupportedGraphError(
            f"Conv ({label(node)}): weight of shape {tuple(weight.shape)}; expected 2-D kernels"
        )
    reader.refuse(node, attributes, {"kernel_shape": list(weight.shape[2:])})
    refuse_inexact(reader, node)
    source = reader.map(node)
    dilation = tuple(attributes.get("dilations", (1, 1)))
    ours = {
        **_window(reader, node, attributes, source, tuple(weight.shape[2:]), dilation),
        "dilation": dilation, "groups": attributes.get("group", 1),
    }  # fmt: skip
    tensors = {"weight": weight} | ({"bias": reader.constant(node, 2)} if reader.has(node, 2) else {})
    reader.append(node, "conv2d", (source,), ours, tensors)


def _window(
    reader: Reader, node: onnx.NodeProto, attributes: Attributes, source: str, kernel: tuple[int, ...],
    dilation: tuple[int, ...] = (1, 1),
) -> Attributes:  # fmt: skip
    """Stride and padding; both ends of a dimension must be padded alike."""
    strides = tuple(attributes.get("strides", (1, 1)))
    pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
    mode = plain(attributes.get("auto_pad", "NOTSET"))
    given = f"pads = {list(pads)}"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = reader.shape(source)[1:]
        need = [
            max(0, (-(-size // stride) - 1) * stride + d * (k - 1) + 1 - size)
            for size, stride, k, d in zip(sizes, strides, kernel, dilation, strict=True)
        ]
        small, large = [n // 2 for n in need], [n - n // 2 for n in need]
        pads, given = (*small, *large), f"auto_pad = {mode!r}"
    elif mode == "VALID":
        pads = (0, 0, 0, 0)
    elif mode != "NOTSET":
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) with auto_pad = {mode!r}")
    if len(pads) != 4 or pads[:2] != pads[2:]:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) with {given}; expected the same padding at both ends"
        )
    return {"stride": strides, "padding": pads[:2]}


def _pool(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    reader.refuse(node, attributes, {"ceil_mode": 0, "dilations": [1, 1], "storage_order": 0})
    if len(node.output) > 1 and node.output[1]:
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) with indices")
    kernel = tuple(attributes["kernel_shape"])
    if len(kernel) != 2:
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}): expected a 2-D kernel")
    source = reader.map(node)
    ours = {"kernel": kernel, **_window(reader, node, attributes, source, kernel)}
    if node.op_type == "AveragePool":
        ours["count_include_pad"] = bool(attributes.get("count_include_pad", 0))
    reader.append(node, "max_pool2d" if node.op_type == "MaxPool" else "avg_pool2d", (source,), ours)


def _global_pool(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    source = reader.map(node)
    kernel = reader.shape(source)[1:]
    ours = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "count_include_pad": True}
    reader.append(node, "avg_pool2d", (source,), ours)


# --- matrix products ---


def _gemm(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    reader.refuse(node, attributes, {"alpha": 1.0, "beta": 1.0, "transA": 0})
    refuse_inexact(reader, node)
    refuse_rounded_inputs(reader, node)
    view, weight = reader.value(node), reader.constant(node, 1)
    weight = weight if attributes.get("transB", 0) else weight.T
    if view.index.dim() != 2 or view.index.shape[0] != 1:
        raise _maps(node, view)
    bias = reader.constant(node, 2).expand(1, weight.shape[0])[0].clone() if reader.has(node, 2) else None
    _linear(reader, node, view, weight, bias, (1, weight.shape[0]))


def _matmul(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    """A value [..., features] times a constant matrix, or a constant matrix times a column [..., features, 1]."""
    left = node.input[0] in reader.constants
    view, matrix = reader.value(node, int(left)), reader.constant(node, 1 - int(left))
    if matrix.dim() != 2:
        raise UnsupportedGraphError(
            f"MatMul ({label(node)}) with a constant of shape {tuple(matrix.shape)}; expected a matrix"
        )
    shape = tuple(view.index.shape)
    features, rest = (shape[-2], (*shape[:-2], shape[-1])) if left and len(shape) > 1 else (shape[-1], shape[:-1])
    if any(d != 1 for d in rest):
        raise _maps(node, view)
    weight = matrix if left else matrix.T
    if left:
        out = (*shape[:-2], weight.shape[0], 1) if len(shape) > 1 else (weight.shape[0],)
    else:
        out = (*shape[:-1], weight.shape[0])
    if weight.shape[1] != features:
        raise ValueError(f"MatMul ({label(node)}) of {shape} and {tuple(matrix.shape)}")
    if left and reader.quantiser(view.node) is not None:
        raise UnsupportedGraphError(f"MatMul ({label(node)}) of a matrix and quantised values; expected them in front")
    if not left:
        refuse_inexact(reader, node)
        refuse_rounded_inputs(reader, node)
    _linear(reader, node, view, weight, None, out)


def _linear(
    reader: Reader, node: onnx.NodeProto, view: View, weight: Tensor, bias: Tensor | None, out: tuple[int, ...]
) -> None:  # fmt: skip
    """``weight`` [rows, features] times the value's entries in the file's order."""
    if weight.shape[1] != view.index.numel():
        raise ValueError(f"{node.op_type} ({label(node)}): {view.index.numel()} features; expected {weight.shape[1]}")
    ordered = torch.empty_like(weight)
    ordered[:, view.index.flatten()] = weight
    tensors = {"weight": ordered} | ({"bias": bias} if bias is not None else {})
    index = torch.arange(weight.shape[0]).view(out)
    reader.append(node, "linear", (reader.flat(view.node),), tensors=tensors, index=index)


def _maps(node: onnx.NodeProto, view: View) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"{node.op_type} ({label(node)}) reads {tuple(view.index.shape[1:])}; expected flat features"
    )


# --- elementwise ---


def _batch_norm(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    reader.refuse(node, attributes, {"training_mode": 0, "spatial": 1})
    view = reader.value(node)
    shape = tuple(view.index.shape)
    if len(shape) < 2 or shape[0] != 1:
        raise UnsupportedGraphError(f"BatchNormalization ({label(node)}) reads {shape}; expected [N, C, ...]")
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: reader.constant(node, i) for i, name in enumerate(names, start=1)}
    ours = {"eps": attributes.get("epsilon", 1e-5), "momentum": 1.0 - attributes.get("momentum", 0.9)}
    if view.in_order and (len(shape) == 2 or reader.shape(view.node) == shape[1:]):
        source = view.node if len(shape) > 2 else reader.flat(view.node)
        reader.append(node, "batch_norm", (source,), ours, tensors, index=view.index)
        return
    own = {f"bn.{name}": tensor for name, tensor in tensors.items()}
    pair = batch_norm_affine(Node("bn", "batch_norm", (), ours), own)
    scale, shift = (t.view(1, -1, *([1] * (len(shape) - 2))).expand(shape) for t in pair)
    affine(reader, node, view, scale, shift, source=node.input[0])


def _relu(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    view = reader.value(node)
    reader.append(node, "relu", (view.node,), index=view.index)


def _leaky_relu(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    view, slope = reader.value(node), float(attributes.get("alpha", 0.01))
    if not 0 <= slope <= 1:
        raise UnsupportedGraphError(f"LeakyRelu ({label(node)}) with alpha = {slope!r}; understood is 0 <= alpha <= 1")
    reader.append(node, "leaky_relu", (view.node,), {"slope": slope}, index=view.index)


# --- layouts: no node of ours ---


def _layout(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    """Flatten, Reshape, Transpose, Squeeze, Unsqueeze."""
    view = reader.value(node)
    match node.op_type:
        case "Flatten":
            axis = attributes.get("axis", 1)
            index, what = flattened(view.index, axis), f"with axis = {axis}"
        case "Reshape":
            reader.refuse(node, attributes, {"allowzero": 0})
            target = reader.integers(node, attributes, "shape") or []
            try:
                index = reshaped(view.index, target)
            except ValueError:
                raise UnsupportedGraphError(
                    f"Reshape ({label(node)}) of {tuple(view.index.shape)} to {target}"
                ) from None
            what = f"to {target}; expected [-1, {view.index.numel()}] or another shape that keeps the batch"
        case "Transpose":
            perm = attributes.get("perm")
            index, what = permuted(view.index, perm), f"with perm = {plain(perm)}"
        case "Squeeze":
            axes = reader.integers(node, attributes, "axes")
            index, what = squeezed(view.index, axes), f"with axes = {axes}"
        case _:
            axes = reader.integers(node, attributes, "axes") or []
            index, what = unsqueezed(view.index, axes), f"with axes = {axes}"
    # a dynamic batch must stay the first dimension, or samples would be mixed
    if reader.dynamic and index.shape[:1] != (1,):
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) {what}")
    if index.dim() == 2:
        reader.flatten_names.setdefault(view.node, node.name)
    reader.views[node.output[0]] = View(view.node, index)


def _identity(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    if (len(node.output) > 1 and node.output[1]) or reader.has(node, 2):
        raise UnsupportedGraphError(f"Dropout ({label(node)}) in training mode")
    reader.views[node.output[0]] = reader.value(node)


TRANSLATIONS: dict[str, Callable[[Reader, onnx.NodeProto, Attributes], None]] = {
    "Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "Add": arithmetic, "Sub": arithmetic, "Mul": arithmetic,
    "Div": arithmetic, "BatchNormalization": _batch_norm, "MaxPool": _pool, "AveragePool": _pool,
    "GlobalAveragePool": _global_pool, "Relu": _relu, "LeakyRelu": _leaky_relu, "Flatten": _layout,
    "Reshape": _layout, "Transpose": _layout, "Squeeze": _layout, "Unsqueeze": _layout, "Identity": _identity,
    "Dropout": _identity, "QuantizeLinear": quantize_linear, "DequantizeLinear": dequantize_linear,
}  # fmt: skip
