"""Quantised activations of ONNX files: QuantizeLinear, layout on the codes, DequantizeLinear.

onnxruntime fuses such pairs and the layer between them into one kernel of integers. Read is only what both ways of
running a file compute alike, up to rounding: it ignores the scale of an integer bias, rounds floating-point weights and
biases of quantised layers to integers, merges quantisers that follow one another, and saturates on large int8 weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import torch
from torch import Tensor

from cactus_ray.bounds.quantizer import LARGEST_SUM, reach
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.arithmetic import Attributes, label

if TYPE_CHECKING:
    from cactus_ray.interchange.layers import Reader

CODE_LAYOUT = ("Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that may work on codes."""
CONSTANT_LAYOUT = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators behind which a constant is still the weight that DequantizeLinear unpacked."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-40, 2.0**40
SAME_SCALE = 2.0**-20
"""Relative difference up to which the scale of a bias is the product of those of inputs and weights."""
RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
LARGEST_PAIR = 128
"""Up to which the sum of two int8 codes, each times a uint8 code of an input, fits 16 bits: 255 * 128 < 2 ** 15."""


def quantize_linear(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    """A quantiser of ours; its value stands for codes until a DequantizeLinear reads them."""
    reader.refuse(node, attributes, {"block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1})
    view = reader.value(node)
    scale, zero_point, (low, high) = _numbers(reader, node)
    ours: Attributes = {"scale": scale, "zero_point": zero_point, "low": low, "high": high}
    reader.append(node, "quantize", (view.node,), ours, index=view.index)
    reader.codes[node.output[0]] = reader.nodes[-1]


def dequantize_linear(reader: Reader, node: onnx.NodeProto, attributes: Attributes) -> None:
    """The other half of a quantiser: reads its codes with the same numbers."""
    reader.refuse(node, attributes, {"block_size": 0, "output_dtype": 0})
    view, quantiser = reader.value(node), reader.codes.get(node.input[0])
    if quantiser is None:
        raise UnsupportedGraphError(
            f"DequantizeLinear ({label(node)}): {node.input[0]!r} is not the result of a QuantizeLinear"
        )
    scale, zero_point, (low, high) = _numbers(reader, node)
    ours = {"scale": scale, "zero_point": zero_point, "low": low, "high": high}
    if ours != dict(quantiser.attributes):
        raise UnsupportedGraphError(
            f"DequantizeLinear ({label(node)}) reads codes of {quantiser.name!r} with {ours}; they were written with"
            f" {dict(quantiser.attributes)}"
        )
    reader.views[node.output[0]] = view
    reader.decoded.add(node.output[0])


def _numbers(reader: Reader, node: onnx.NodeProto) -> tuple[float, int, tuple[int, int]]:
    """Scale, zero point and range of codes: one of each per tensor, and constants."""
    for position, what in ((1, "scale"), (2, "zero point")):
        if reader.has(node, position) and node.input[position] not in reader.constants:
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}): its {what} depends on the image; only static scales are certified"
            )
    scale = reader.constant(node, 1)
    zero = reader.constants[node.input[2]] if reader.has(node, 2) else torch.zeros((), dtype=torch.uint8)
    if zero.dtype not in RANGES or zero.numel() == 0:  # constants of other types are not kept
        raise UnsupportedGraphError(f"{node.op_type} ({label(node)}) to another type than uint8 and int8")
    if scale.numel() != 1 or zero.numel() != 1:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) of an activation with scales of shape {tuple(scale.shape)}; expected one"
            " for the whole tensor"
        )
    if not LEAST_SCALE <= float(scale) <= LARGEST_SCALE:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) with scale {float(scale)!r}; expected {LEAST_SCALE:g} to {LARGEST_SCALE:g}"
        )
    return float(scale), int(zero), RANGES[zero.dtype]


def refuse_inexact(reader: Reader, node: onnx.NodeProto) -> None:
    """Raises UnsupportedGraphError where a layer on quantised values is another function once it is fused."""
    quantiser = reader.quantiser(reader.value(node).node)
    if quantiser is None:
        return
    weight, scales = _decoded(reader, node, 1, (torch.uint8, torch.int8))
    rows = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
    _refuse_saturating(reader, node, rows)
    sums = (weight.abs().flatten(1).sum(1) if rows else weight.abs().sum(0)) * reach(quantiser)
    if reader.has(node, 2):
        bias, units = _decoded(reader, node, 2, (torch.int32,))
        expected = quantiser["scale"] * scales
        if bool(((units - expected).abs() > SAME_SCALE * expected).any()):
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}): the scale of its bias is not that of its inputs times those of its"
                " weights; onnxruntime takes them for equal"
            )
        sums = sums + bias.abs().flatten()
    if float(sums.max()) > LARGEST_SUM:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}): sums of its integers may reach {float(sums.max()):.4g}; 32 bits hold"
            f" {LARGEST_SUM}"
        )


def refuse_rounded_inputs(reader: Reader, node: onnx.NodeProto) -> None:
    """Raises UnsupportedGraphError for a product with integers as weights whose inputs a runtime may round to 8 bits.

    onnxruntime (1.31) turns DequantizeLinear, perhaps with layout behind it, and MatMul or Gemm into MatMulNBits, which
    by default quantises its inputs while it runs. It does not where Gemm reads rows (transB = 1) from DequantizeLinear
    itself, nor where the inputs are codes, with which it makes one kernel of integers.
    """
    name, unpacked = node.input[1], False
    while (maker := reader.makers.get(name)) is not None and not unpacked:
        unpacked = maker.op_type == "DequantizeLinear"
        if not unpacked and maker.op_type not in CONSTANT_LAYOUT:
            return
        name = maker.input[0]
    if not unpacked:
        return
    rows = any(a.name == "transB" and a.i for a in node.attribute)
    direct = reader.makers[node.input[1]].op_type == "DequantizeLinear"
    if (rows and direct) or node.input[0] in reader.decoded:
        return
    raise UnsupportedGraphError(
        f"{node.op_type} ({label(node)}): its weight {node.input[1]!r} is unpacked from integers, and onnxruntime may"
        " round the inputs of such a product to 8 bits (MatMulNBits); expected Gemm with transB = 1 that reads"
        " DequantizeLinear itself, or float32 weights"
    )


def _refuse_saturating(reader: Reader, node: onnx.NodeProto, rows: bool) -> None:
    """Raises where two products of one sum may leave 16 bits in a kernel of uint8 times int8.

    On x86 CPUs without VNNI such kernels add products in pairs and saturate (vpmaddubsw). Codes count as they are
    stored: zero points are put right afterwards. int8 inputs are no way out, since onnxruntime turns them into uint8
    there. Which codes are a pair depends on the kernel: any two of an output channel may be. uint8 weights are exact.
    """
    name = reader.makers[node.input[1]].input[0]
    codes = reader.constants[name]
    if codes.dtype != torch.int8:
        return
    terms = codes.int().flatten(1) if rows else codes.int().T  # [output channels, terms of a sum]
    for largest in (True, False):
        pairs = terms.topk(min(2, terms.shape[1]), largest=largest).values
        worst = pairs[pairs.sum(1).abs().argmax()]
        if abs(int(worst.sum())) > LARGEST_PAIR:
            first, second = worst.tolist()
            raise UnsupportedGraphError(
                f"{node.op_type} ({label(node)}) on quantised values: {name!r} holds the int8 codes {first} and"
                f" {second} in one output channel; onnxruntime's kernels on x86 CPUs without VNNI saturate in 16 bits"
                f" there; expected int8 codes of which no two add up to more than {LARGEST_PAIR} in magnitude (such as"
                " -64 to 64: reduce_range), or uint8 codes"
            )


def _decoded(
    reader: Reader, node: onnx.NodeProto, position: int, kinds: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes minus zero points, and scales, of a weight or bias of a layer on quantised values; float64."""
    name, what = node.input[position], {1: "weight", 2: "bias"}[position]
    kind = {1: "8-bit integers", 2: "int32 integers"}[position]
    maker = reader.makers.get(name)
    values = [reader.constants[i] for i in maker.input if i] if maker is not None else []
    if maker is None or maker.op_type != "DequantizeLinear" or values[0].dtype not in kinds:
        raise UnsupportedGraphError(
            f"{node.op_type} ({label(node)}) on quantised values: its {what} {name!r} is not dequantised from {kind};"
            " onnxruntime would round it to integers of its own choice"
        )
    codes, scales = values[0].double(), values[1].double()
    zeros = values[2].double() if len(values) == 3 else torch.zeros(())
    axis = next((a.i for a in maker.attribute if a.name == "axis"), 1) % max(codes.dim(), 1)
    blocks = any(a.name == "block_size" and a.i for a in maker.attribute)
    if blocks or scales.dim() > 1 or not bool(((scales >= LEAST_SCALE) & (scales <= LARGEST_SCALE)).all()):
        raise UnsupportedGraphError(
            f"DequantizeLinear ({label(maker)}) of a {what}: expected scales between {LEAST_SCALE:g} and"
            f" {LARGEST_SCALE:g}, one or one per output channel"
        )
    if zeros.numel() > 1:
        zeros = zeros.view([-1 if d == axis else 1 for d in range(codes.dim())])
    return codes - zeros, scales
