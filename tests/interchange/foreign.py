"""Small files with quantised activations as other tools write them."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Foreign:
    """A small file of one quantised layer or two, each part of which a test may change."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def take(self, name: str, usual: Any) -> Any:
        return self.changes.get(name, usual)

    def tensor(self, name: str, values: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"the {output}", **attributes))
        return output

    def file(self) -> bytes:
        take = self.take
        scale, zero = (
            self.tensor("scale", take("scale", np.float32(0.01))),
            self.tensor("zero", take("zero", np.uint8(3))),
        )
        if take("dynamic", False):
            self.node("DynamicQuantizeLinear", ["image"], "codes")
            self.nodes[-1].output.extend(["s", "z"])
            scale, zero = "s", "z"
        elif take("scale of the image", False):
            scale = self.node("Relu", ["image"], "largest")
            self.node("QuantizeLinear", ["image", scale, zero], "codes")
        else:
            self.node("QuantizeLinear", ["image", scale, zero], "codes")
        other = self.tensor("other", take("other scale", np.float32(0.01)))
        value = self.node(
            "DequantizeLinear", ["codes", scale if "other scale" not in self.changes else other, zero], "value"
        )
        if take("codes to the layer", False):
            value = self.node("Relu", ["codes"], "wrong")
        weight = np.arange(-6, 6, dtype=np.int8).reshape(3, 4) if take("weight", None) is None else take("weight", None)
        if weight.dtype == np.float32:
            matrix = self.tensor("weight", weight)
        else:
            codes = self.tensor("weight codes", weight)
            scales = self.tensor("weight scale", take("weight scale", np.float32([0.5, 0.25, 0.125])))
            zeros = self.tensor("weight zeros", np.zeros(np.shape(take("weight scale", np.zeros(3))), weight.dtype))
            matrix = self.node("DequantizeLinear", [codes, scales, zeros], "matrix", axis=0)
        bias = take("bias", np.array([10, -20, 30], np.int32))
        inputs = [value, matrix]
        if bias is not None and bias.dtype == np.int32:
            units = self.tensor("units", take("units", (np.float32(0.01) * np.float32([0.5, 0.25, 0.125]))))
            inputs.append(self.node("DequantizeLinear", [self.tensor("bias codes", bias), units], "offset", axis=0))
        elif bias is not None:
            inputs.append(self.tensor("bias", bias))
        if take("product", "Gemm") == "MatMul":
            output = self.node("MatMul", [value, self.node("Transpose", [matrix], "columns")], "product")
            output = self.node("Add", [output, self.tensor("late", np.float32([0.1, 0.2, 0.3]))], "one")
        else:
            output = self.node("Gemm", inputs, "one", transB=1)
        for position, op in enumerate(take("behind", ["Relu", "QuantizeLinear", "DequantizeLinear"])):
            step = [self.tensor(f"step {position}", np.float32(0.125)), self.tensor(f"none {position}", np.uint8(0))]
            output = self.node(op, [output, *(step if "Linear" in op else [])], f"behind {position}")
        kind = (
            TensorProto.UINT8
            if output == "behind 0" and take("behind", [""])[0] == "QuantizeLinear"
            else TensorProto.FLOAT
        )
        graph = helper.make_graph(
            self.nodes, "foreign", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 4])],
            [helper.make_tensor_value_info(output, kind, ["N", 3])], self.tensors,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        return bytes(model.SerializeToString())


def products(addition: bool) -> bytes:
    """A product of quantised values with int8 weights, perhaps an addition, and a quantiser."""
    tensors = {
        "s": np.float32(0.01), "z": np.uint8(3), "w": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
        "ws": np.float32([0.01, 0.02, 0.03]), "wz": np.zeros(3, np.int8), "b": np.float32([0.0032, 0.11, 0.22]),
        "s2": np.float32(0.0123), "z2": np.uint8(77),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["v"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["W"], axis=1),
        helper.make_node("MatMul", ["v", "W"], ["m"]),
        *([helper.make_node("Add", ["m", "b"], ["a"])] if addition else []),
        helper.make_node("QuantizeLinear", ["a" if addition else "m", "s2", "z2"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "s2", "z2"], ["y"]),
    ]
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", d]) for n, d in (("image", 4), ("y", 3))]
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "products", shapes[:1], shapes[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return bytes(model.SerializeToString())


UNIT, OUT = 2.0**-8, 2.0**-6
"""Scale of the inputs and weights of ``one_layer``, and of its outputs where they are quantised."""


def one_layer(
    op: str, codes: NDArray[Any], zero: np.integer[Any], *, weight_zero: int = 0, image: tuple[int, ...] = ()
) -> bytes:  # fmt: skip
    """A layer of 8-bit weights [outputs, inputs] on quantised values: "Gemm", "columns" (transB = 0), "MatMul", "Conv".

    All scales are powers of two: products and sums are exact. Conv (1x1) is fused only where a quantiser follows.
    """
    rows, columns = codes.shape
    turned = op in ("columns", "MatMul")
    stored = codes.reshape(rows, columns, 1, 1) if op == "Conv" else np.ascontiguousarray(codes.T if turned else codes)
    tensors = {
        "s": np.float32(UNIT), "z": zero, "out": np.float32(OUT), "middle": np.uint8(128), "w": stored,
        "ws": np.full(rows, UNIT, np.float32), "wz": np.full(rows, weight_zero, codes.dtype),
    }  # fmt: skip
    nodes = [
        *([] if op == "Conv" else [helper.make_node("Flatten", ["image"], ["row"])]),
        helper.make_node("QuantizeLinear", ["image" if op == "Conv" else "row", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["v"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["W"], axis=int(turned)),
        helper.make_node({"columns": "Gemm"}.get(op, op), ["v", "W"], ["y"], **({"transB": 1} if op == "Gemm" else {})),
    ]
    if op == "Conv":
        nodes += [
            helper.make_node("QuantizeLinear", ["y", "out", "middle"], ["d"]),
            helper.make_node("DequantizeLinear", ["d", "out", "middle"], ["e"]),
            helper.make_node("Flatten", ["e"], ["flat"]),
        ]
    shape = image or ((columns, 1, 1) if op == "Conv" else (columns,))
    named = ("image", ["N", *shape]), ("flat" if op == "Conv" else "y", ["N", rows])
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in named]
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "one layer", shapes[:1], shapes[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return bytes(model.SerializeToString())
