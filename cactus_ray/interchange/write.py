"""A compressed network as an ONNX file of plain operators (opset 21), whose size really shrinks with the level.

Weights are stored in the cheapest of several encodings (``encode.choose``) and unpacked by ordinary operators that
depend on constants only, so a runtime computes them once, while it loads the file. What onnxruntime computes is bit for
bit ``Compressed.params``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cactus_ray.bounds.graph import Graph
from cactus_ray.bounds.quantizer import input_scales
from cactus_ray.compression.materialize import Compressed
from cactus_ray.compression.stored import Factored, Stored, Weight
from cactus_ray.interchange import encode
from cactus_ray.interchange.nodes import INPUT, OUTPUT, write_layers

OPSET, IR_VERSION = 21, 10
OFFSET = 128
"""Zero point of w8a8's weights, which are stored as uint8: onnxruntime's kernels of uint8 times uint8 are exact, while
those of uint8 times int8 saturate in 16 bits on x86 CPUs without VNNI."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a user of the file must know beside the tensors."""

    data_name: str
    class_names: tuple[str, ...]
    domain: tuple[float, float]


def onnx_bytes(compressed: Compressed, info: FileInfo) -> bytes:
    """The file: input "image" [N, C, H, W] float32 (N free), output "logits" [N, classes]. Deterministic.

    Metadata (``cactus_ray.*``): level, data, class_names (JSON), input, domain (JSON), normalization. Raises
    UnsupportedGraphError where ONNX's Gemm cannot express a linear layer (an input that is not flat).
    """
    builder = Builder(integers_inside=compressed.level.integer_inference)
    weights = {f"{n.name}.weight" for n in compressed.graph.weighted()}
    # in the graph's order: that of the dict may be another one each time a network file is read
    place = {node.name: i for i, node in enumerate(compressed.graph.nodes)}
    ordered = sorted(compressed.stored.items(), key=lambda item: (place[item[0].rpartition(".")[0]], item[0]))
    builder.weights({k: s for k, s in ordered if k in weights})
    scales = input_scales(compressed.graph)
    for name, stored in ordered:
        if name in weights or isinstance(stored, Factored):
            continue
        if stored.scale is not None:
            builder.bias(name, stored, scales[name.rpartition(".")[0]])
        else:
            builder.small(name, stored)
    classes = write_layers(builder, compressed)
    graph = helper.make_graph(
        builder.nodes,
        "cactus_ray",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *compressed.graph.input_shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", classes])],
        builder.initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="cactus_ray"
    )
    helper.set_model_props(model, _metadata(compressed, info))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _metadata(compressed: Compressed, info: FileInfo) -> dict[str, str]:
    return {
        "cactus_ray.level": str(compressed.level),
        "cactus_ray.data": info.data_name,
        "cactus_ray.class_names": json.dumps(list(info.class_names)),
        "cactus_ray.input": "NCHW",
        "cactus_ray.domain": json.dumps(list(info.domain)),
        "cactus_ray.normalization": normalization(compressed.graph),
    }


def normalization(graph: Graph) -> str:
    """Where pixels are normalised, for users of a file: "inside" of the network, or "none"."""
    first = graph.consumers()[graph.nodes[0].name]
    return "inside" if len(first) == 1 and first[0].op == "scale_shift" else "none"


class Builder:
    """Collects nodes and initialisers; names of intermediate values are short because each is written twice."""

    def __init__(self, *, integers_inside: bool = False) -> None:
        self.integers_inside = integers_inside
        self.scales: dict[str, str] = {}  # by weight
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"_{np.base_repr(self.count, 36).lower()}"

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def initializer(self, raw: bytes, kind: int, shape: Sequence[int], name: str | None = None) -> str:
        tensor = TensorProto(name=name or self.fresh(), data_type=kind, dims=shape, raw_data=raw)
        self.initializers.append(tensor)
        return str(tensor.name)

    def constant(self, array: NDArray[Any]) -> str:
        """A small constant, shared by all that need the same."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.shared[key] = self.initializer(array.tobytes(), kind, array.shape)
        return self.shared[key]

    # --- values ---

    def floats(self, values: torch.Tensor, output: str | None = None) -> str:
        """Float32 tensor of stored floating-point (or 8-bit) values."""
        if values.dtype == torch.float32:
            return self.initializer(values.numpy().tobytes(), TensorProto.FLOAT, values.shape, output)
        kind = {
            torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16, torch.int8: TensorProto.INT8,
            torch.uint8: TensorProto.UINT8,
        }[values.dtype]  # fmt: skip
        raw = values.contiguous().view(torch.uint8).numpy().tobytes()
        return self.add("Cast", [self.initializer(raw, kind, values.shape)], output, to=TensorProto.FLOAT)

    def small(self, name: str, stored: Stored) -> None:
        """A bias: half precision only where that saves more than the cast costs."""
        values = stored.values if stored.values.numel() > 16 else stored.tensor
        self.floats(values, name)

    def bits(self, packed: NDArray[np.uint8]) -> str:
        """[bytes, 8] uint8 of the bits, least significant first."""
        source = self.initializer(packed.tobytes(), TensorProto.UINT8, [len(packed), 1])
        shifted = self.add("BitShift", [source, self.constant(np.arange(8, dtype=np.uint8))], direction="RIGHT")
        return self.add("BitwiseAnd", [shifted, self.constant(np.array(1, np.uint8))])

    def integers(self, values: NDArray[Any], bits: int, *, signed: bool) -> str:
        """[n', 1] float32 of small integers (two's complement where signed), n' >= n with zeros at the end."""
        if bits == 8:
            kind = TensorProto.INT8 if signed else TensorProto.UINT8
            source = self.initializer(values.tobytes(), kind, [len(values), 1])
            return self.add("Cast", [source], to=TensorProto.FLOAT)
        padded = np.zeros(-(-len(values) // 8) * 8, np.uint8)
        padded[: len(values)] = values.astype(np.uint8)
        fields = self.bits(encode.pack_bits(padded, bits))
        fields = self.add("Reshape", [fields, self.constant(np.array([-1, bits]))])
        fields = self.add("Cast", [fields], to=TensorProto.FLOAT)
        powers = 2.0 ** np.arange(bits)
        powers[-1] *= -1.0 if signed else 1.0
        return self.add("MatMul", [fields, self.constant(powers.astype(np.float32)[:, None])])

    def values(self, stored: Stored, values: torch.Tensor) -> str:
        """[n', 1] float32 of some of a tensor's stored values, in a row."""
        if stored.bits is None:
            return self.floats(values[:, None])
        return self.integers(values.numpy(), stored.bits, signed=stored.signed)

    # --- integers that stay integers (w8a8) ---

    def codes(self, values: torch.Tensor) -> str:
        """Uint8 tensor of int8 codes plus OFFSET."""
        shifted = (values.to(torch.int16) + OFFSET).to(torch.uint8)
        return self.initializer(shifted.numpy().tobytes(), TensorProto.UINT8, values.shape)

    def bias(self, name: str, stored: Stored, inputs: float) -> None:
        """An int32 bias in units of the scale of the layer's inputs times those of its weights."""
        values = self.initializer(stored.values.numpy().tobytes(), TensorProto.INT32, stored.values.shape)
        weight = self.scales[name.removesuffix("bias") + "weight"]
        units = self.add("Mul", [self.constant(np.array(inputs, np.float32)), weight])
        self.add("DequantizeLinear", [values, units], name, axis=0)

    # --- streams of weights ---

    def weights(self, weights: dict[str, Weight]) -> None:
        """All weights by name; those of several parts are formed from them."""
        plain: dict[str, Stored] = {}
        parts: dict[str, dict[str, str]] = {}
        for name, stored in weights.items():
            if isinstance(stored, Factored):
                parts[name] = {kind: self.fresh() for kind in stored.parts}
                plain |= {parts[name][kind]: part for kind, part in stored.parts.items()}
            else:
                plain[name] = stored
        self.streams(plain)
        for name, stored in weights.items():
            if isinstance(stored, Factored):
                self.formed(name, stored, parts[name])

    def formed(self, name: str, stored: Factored, parts: dict[str, str]) -> None:
        """``scale * (left @ right + multiple * sparse)`` of the tensors named ``parts``."""
        total = None
        if "left" in parts:
            total = self.add("MatMul", [parts["left"], parts["right"]])
        if "sparse" in parts:
            sparse = parts["sparse"]
            if bool((stored.multiple != 1).any()):
                few = stored.multiple.numel() <= 16  # as for zero points below
                column = stored.multiple[:, None]
                sparse = self.add("Mul", [sparse, self.floats(column.float() if few else column)])
            total = sparse if total is None else self.add("Add", [total, sparse])
        assert total is not None
        flat = len(stored.shape) == 2
        total = self.add("Mul", [total, self.floats(stored.scale[:, None])], name if flat else None)
        if not flat:
            self.add("Reshape", [total, self.constant(np.array(stored.shape))], name)

    def streams(self, weights: dict[str, Stored]) -> None:
        chosen = encode.choose(weights)
        for encoding in encode.ENCODINGS:
            members = {k: s for k, s in weights.items() if chosen[k] == encoding}
            if not members:
                continue
            example = next(iter(members.values()))
            if encoding == "dense" and encode.value_bits(example) in (8, 16, 32):
                for name, stored in members.items():
                    if self.integers_inside:
                        self.scaled(name, stored, self.codes(stored.values))
                    else:
                        self.scaled(name, stored, self.floats(stored.values, self.raw_name(name, stored)))
                continue
            stream = torch.cat([s.values.flatten() for s in members.values()])
            if encoding == "dense":
                flat, length = self.values(example, stream), -(-len(stream) // 8) * 8
            elif encoding == "mask":
                flat, length = self.masked(example, stream), -(-len(stream) // 8) * 8
            else:
                flat, length = self.scattered(example, stream, int(encoding.removeprefix("gaps"))), len(stream)
            if self.integers_inside:
                flat = self.add("Add", [flat, self.constant(np.array(OFFSET, np.float32))])
                flat = self.add("Cast", [flat], to=TensorProto.UINT8)
            self.split(members, flat, length)

    def masked(self, stored: Stored, stream: torch.Tensor) -> str:
        """Bit mask and nonzero values; the value in front of them is the zero that masked entries point at."""
        present = (stream != 0).numpy()
        bits = self.bits(np.packbits(present, bitorder="little"))
        bits = self.add("Reshape", [bits, self.constant(np.array([-1]))])
        bits = self.add("Cast", [bits], to=TensorProto.INT32)
        index = self.add("CumSum", [bits, self.constant(np.array(0, np.int32))])
        index = self.add("Mul", [index, bits])
        nonzero = torch.cat([stream.new_zeros(1), stream[torch.from_numpy(present)]])
        return self.add("Gather", [self.values(stored, nonzero), index])

    def scattered(self, stored: Stored, stream: torch.Tensor, width: int) -> str:
        """Distances between nonzero values, and the values; fillers add 0 to what lies at their place."""
        positions = stream.nonzero().flatten()
        unpacked = width != 8 or stored.bits not in (None, 8)
        found = encode.gaps(positions.numpy(), width, 8 if unpacked else 1)
        source = torch.from_numpy(found.source)
        values = stream.new_zeros(len(source))
        values[source >= 0] = stream[positions]
        distances = self.integers(found.distances, width, signed=False)
        index = self.add("Cast", [distances], to=TensorProto.INT32)
        index = self.add("CumSum", [index, self.constant(np.array(0, np.int32))])
        zeros = self.add("ConstantOfShape", [self.constant(np.array([len(stream), 1]))])
        return self.add("ScatterElements", [zeros, index, self.values(stored, values)], reduction="add")

    def split(self, members: dict[str, Stored], flat: str, length: int) -> None:
        """Cuts a stream of ``length`` entries into its tensors."""
        sizes = [s.values.numel() for s in members.values()]
        parts = [flat]
        if sizes != [length]:
            parts = [self.fresh() for _ in sizes]
            rest = length - sum(sizes)
            outputs = parts + ([self.fresh()] if rest else [])
            lengths = self.constant(np.array(sizes + ([rest] if rest else [])))
            self.nodes.append(helper.make_node("Split", [flat, lengths], outputs))
        for (name, stored), part in zip(members.items(), parts, strict=True):
            shape = self.constant(np.array(stored.values.shape))
            self.scaled(name, stored, self.add("Reshape", [part, shape], self.raw_name(name, stored)))

    def raw_name(self, name: str, stored: Stored) -> str | None:
        """Integers still need their scale, or table, so their codes do not carry the tensor's name."""
        return name if stored.scale is None and stored.table is None else None

    def scaled(self, name: str, stored: Stored, codes: str) -> None:
        if stored.table is not None:
            places = self.add("Cast", [codes], to=TensorProto.INT32)
            self.add("Gather", [self.floats(stored.table), places], name)
        if stored.scale is None:
            return
        if self.integers_inside:
            self.scales[name] = self.initializer(stored.scale.numpy().tobytes(), TensorProto.FLOAT, stored.scale.shape)
            zeros = self.constant(np.full(len(stored.scale), OFFSET, np.uint8))
            self.add("DequantizeLinear", [codes, self.scales[name], zeros], name, axis=0)
            return
        channels = (-1, *([1] * (stored.values.dim() - 1)))
        if stored.zero_point is not None and stored.bits is not None:  # as in ``dequantize``
            few = stored.zero_point.numel() <= 16  # then the cast would cost more than it saves
            zero = self.floats(stored.zero_point.float().view(channels) if few else stored.zero_point.view(channels))
            modulus = self.constant(np.array(2.0**stored.bits, np.float32))
            codes = self.add("Mod", [self.add("Add", [codes, zero]), modulus], fmod=1)
            codes = self.add("Sub", [codes, zero])
        columns = stored.scale.view(channels)
        scale = self.initializer(columns.numpy().tobytes(), TensorProto.FLOAT, columns.shape)
        self.add("Mul", [codes, scale], name)
