"""Additions and products of ONNX files: with constants, a scale and a shift; of two branches, a residual sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Node
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.layouts import View

if TYPE_CHECKING:
    from cactus_ray.interchange.layers import Reader

Attributes = dict[str, Any]


def label(node: onnx.NodeProto) -> str:
    """How messages name a node of the file."""
    return f"node {node.name!r}" if node.name else f"output {node.output[0]!r}"


def plain(value: Any) -> Any:
    """An attribute as text, number or list."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return list(value) if isinstance(value, tuple) or not isinstance(value, str | int | float | list) else value


def arithmetic(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    """Add and Sub of two branches, or Add, Sub, Mul and Div with constants."""
    constant = [i for i in (0, 1) if node.input[i] in reader.constants]
    if not constant:
        _two_branches(reader, node)
        return
    place = constant[0]
    view, values = reader.value(node, 1 - place), reader.constant(node, place)
    maker = reader.makers.get(node.input[place])
    if maker is not None and maker.op_type == "DequantizeLinear" and reader.quantiser(view.node) is not None:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) of quantised values with a quantised constant: onnxruntime may compute it"
            " in integers; expected a float32 constant"
        )
    try:
        values = values.expand(view.index.shape)
    except RuntimeError:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) of {tuple(view.index.shape)} with a constant of shape"
            f" {tuple(values.shape)}; expected one that broadcasts to the value"
        ) from None
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    match node.op_type, place:
        case "Add", _:
            pair = one, values
        case "Sub", 1:
            pair = one, -values
        case "Sub", 0:
            pair = -one, values
        case "Mul", _:
            pair = values, zero
        case "Div", 1:
            if bool((values == 0).any()):
                raise UnsupportedGraphError(f"Div ({label(node)}) by zero")
            pair = 1 / values, zero
        case _:
            raise UnsupportedGraphError(f"Div ({label(node)}) of a constant by a value that depends on the image")
    affine(reader, node, view, *pair, source=node.input[1 - place])


def _two_branches(reader: Reader, node: onnx.NodeProto) -> None:
    if node.op_type not in ("Add", "Sub"):
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) of two values that depend on the image")
    first, second = reader.value(node, 0), reader.value(node, 1)
    if first.index.shape != second.index.shape:
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) of different shapes")
    if not torch.equal(first.index, second.index):
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) of a value and a transposed one")
    left, right = first.node, second.node
    if reader.shape(left) != reader.shape(right):
        left, right = reader.flat(left), reader.flat(right)
    if node.op_type == "Sub":
        ones = torch.ones(reader.shape(right)[0], dtype=torch.float64)
        reader.append(node, "scale_shift", (right,), tensors={"scale": -ones, "shift": 0 * ones})
        right = reader.nodes[-1].name
    reader.append(node, "add", (left, right), index=first.index)


def affine(
    reader: Reader, node: onnx.NodeProto, view: View, scale: Tensor, shift: Tensor, source: str
) -> None:  # fmt: skip
    """``value * scale + shift``, both of the value's shape; ``source`` is the value's name in the file."""
    shape = reader.shape(view.node)
    where = view.index.flatten()
    own = [torch.empty(where.numel(), dtype=torch.float64).index_copy_(0, where, t.flatten()) for t in (scale, shift)]
    channels = [t.view(shape[0], -1) for t in own]
    if all(bool((t == t[:, :1]).all()) for t in channels):
        name, (scale, shift) = view.node, [t[:, 0].clone() for t in channels]
    else:  # not one number per channel: one per feature
        name, (scale, shift) = reader.flat(view.node), own
    direct = source == reader.direct and reader.readers[source] == 1 and name == reader.nodes[-1].name
    if direct and bool((scale == 1).all()) and _merged(reader, reader.nodes[-1], shift):
        reader.views[node.output[0]] = View(name, view.index)
        reader.direct = node.output[0]
        return
    reader.append(node, "scale_shift", (name,), tensors={"scale": scale, "shift": shift}, index=view.index)


def _merged(reader: Reader, last: Node, shift: Tensor) -> bool:
    """Gives a matrix product, or a scale by channel constants, the shift that directly follows it.

    Raises UnsupportedGraphError for a product of quantised values.
    """
    if last.op == "linear" and reader.quantiser(last.inputs[0]) is not None and bool(shift.any()):
        raise UnsupportedGraphError(
            f"addition behind the product {last.name!r} of quantised values: onnxruntime makes it a bias and rounds it;"
            " expected Gemm with a bias that is dequantised from int32 integers"
        )
    if last.op == "linear" and f"{last.name}.bias" not in reader.params:
        reader.params[f"{last.name}.bias"] = shift
    elif last.op == "scale_shift" and not bool(reader.params[f"{last.name}.shift"].any()):
        reader.params[f"{last.name}.shift"] = shift
    else:
        return False
    return True
