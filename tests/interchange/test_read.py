from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deployable
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from cactus_ray.bounds.graph import forward
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.interchange import run
from cactus_ray.interchange.read import read_onnx
from cactus_ray.interchange.write import onnx_bytes

GENERATOR = np.random.default_rng(0)


def model(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], shape: Sequence[Any] = ("N", 2, 4, 4),
    output: str = "y",
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        list(nodes), "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def floats(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype(np.float32)


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


HEAD = [node("Flatten", ["h"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]


def agrees(proto: onnx.ModelProto, shape: tuple[int, ...] = (2, 4, 4)) -> list[str]:
    """Reads a file, compares it with onnxruntime on random images, returns the operators."""
    data = proto.SerializeToString()
    graph, params, _ = read_onnx(data)
    x: Tensor = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    expected = run.logits(data, x)
    assert (forward(graph, params, x) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    return [n.op for n in graph.nodes]


def test_matrix_products_and_their_bias() -> None:
    constants = {"V": floats(32, 5), "v": floats(5), "W": floats(3, 5), "w": floats(1, 3)}
    nodes = [
        node("Reshape", ["x", "shape"], "f"),
        node("MatMul", ["f", "V"], "m"),
        node("Add", ["v", "m"], "a"),
        node("Relu", ["a"], "r"),
        node("Gemm", ["r", "W", "w"], "y", transB=1),
    ]
    operators = agrees(model(nodes, constants | {"shape": np.array([-1, 32])}))
    assert operators == ["input", "flatten", "linear", "relu", "linear"]


def test_a_product_that_is_also_read_without_its_bias() -> None:
    """Merging the addition into the layer would change the other reader."""
    constants = {"V": floats(32, 3), "v": floats(3)}
    nodes = [
        node("Flatten", ["x"], "f"),
        node("MatMul", ["f", "V"], "m"),
        node("Identity", ["m"], "i"),
        node("Add", ["i", "v"], "a"),
        node("Relu", ["a"], "r"),
        node("Add", ["r", "m"], "y"),
    ]
    assert agrees(model(nodes, constants)) == ["input", "flatten", "linear", "scale_shift", "relu", "add"]
    nodes[3] = node("Add", ["m", "v"], "a")
    assert agrees(model(nodes, constants)) == ["input", "flatten", "linear", "scale_shift", "relu", "add"]


def test_channel_constants_pools_and_batch_norm() -> None:
    constants = {
        "s": floats(2, 1, 1), "t": floats(1, 2, 1, 1), "K": floats(4, 2, 3, 3), "k": floats(4), "g": floats(4),
        "b": floats(4), "mean": floats(4), "var": np.abs(floats(4)) + 0.5, "u": floats(4, 1, 1), "W": floats(3, 4),
    }  # fmt: skip
    nodes = [
        node("Mul", ["x", "s"], "n1"),
        node("Add", ["n1", "t"], "n2"),
        node("Conv", ["n2", "K", "k"], "c", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("BatchNormalization", ["c", "g", "b", "mean", "var"], "bn", epsilon=1e-3),
        node("MaxPool", ["bn"], "p", kernel_shape=[2, 2], strides=[1, 1], pads=[1, 1, 1, 1]),
        node("AveragePool", ["p"], "q", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Dropout", ["q"], "d"),
        node("Add", ["d", "u"], "e"),
        node("GlobalAveragePool", ["e"], "h"),
        *HEAD,
    ]
    operators = agrees(model(nodes, constants))
    assert operators == [
        "input", "scale_shift", "conv2d", "batch_norm", "max_pool2d", "avg_pool2d", "scale_shift", "avg_pool2d",
        "flatten", "linear",
    ]  # fmt: skip


def test_weights_may_be_computed_by_any_plain_constant_operators() -> None:
    codes = GENERATOR.integers(-8, 8, (3, 32)).astype(np.int8)
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(1, np.int8))),
        node("DequantizeLinear", ["q", "scale", "zero"], "d"),
        node("Neg", ["d"], "n"),
        node("Transpose", ["n"], "W", perm=[1, 0]),
        node("Flatten", ["x"], "f"),
        node("Gemm", ["f", "W"], "y"),
    ]
    proto = model(nodes, {"q": codes, "scale": np.array(0.1, np.float32)})
    assert agrees(proto) == ["input", "flatten", "linear"]
    _, params, _ = read_onnx(proto.SerializeToString())
    (weight,) = params.values()
    assert torch.equal(weight, -(torch.from_numpy(codes).float() - 1) * torch.tensor(0.1))


def test_nodes_that_the_output_does_not_need_are_ignored() -> None:
    nodes = [node("Sigmoid", ["x"], "unused"), node("Flatten", ["x"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]
    assert agrees(model(nodes, {"W": floats(3, 32)})) == ["input", "flatten", "linear"]


REFUSED: dict[str, tuple[list[onnx.NodeProto], str]] = {
    "operator": ([node("Sigmoid", ["x"], "h"), *HEAD], "'Sigmoid'"),
    "softmax": ([node("Flatten", ["x"], "f"), node("Softmax", ["f"], "y")], "'Softmax'"),
    "own domain": ([node("Relu", ["x"], "h", domain="evil"), *HEAD], "evil"),
    "random weights": ([node("RandomNormal", [], "W", shape=[3, 32]), node("Relu", ["x"], "h"), *HEAD], "RandomNormal"),
    "asymmetric pads": ([node("Conv", ["x", "K"], "h", pads=[1, 1, 0, 0]), *HEAD], "pads = [1, 1, 0, 0]"),
    "auto_pad": (
        [node("MaxPool", ["x"], "h", kernel_shape=[2, 2], auto_pad="SAME_UPPER"), *HEAD], "auto_pad = 'SAME_UPPER'"
    ),
    "ceil_mode": ([node("MaxPool", ["x"], "h", kernel_shape=[2, 2], ceil_mode=1), *HEAD], "ceil_mode = 1"),
    "dilated pool": ([node("MaxPool", ["x"], "h", kernel_shape=[2, 2], dilations=[2, 2]), *HEAD], "dilations = [2, 2]"),
    "flatten axis": ([node("Flatten", ["x"], "f", axis=2), node("Gemm", ["f", "W"], "y", transB=1)], "axis = 2"),
    "alpha": ([node("Flatten", ["x"], "f"), node("Gemm", ["f", "W"], "y", transB=1, alpha=2.0)], "alpha = 2.0"),
    "image times image": ([node("Mul", ["x", "x"], "h"), *HEAD], "Mul (output 'h')"),
    "weights from the image": ([node("Flatten", ["x"], "f"), node("Gemm", ["f", "f"], "y", transB=1)], "'f' must be a"),
    "a constant per pixel before a convolution": (
        [node("Mul", ["x", "M"], "g"), node("Conv", ["g", "K"], "h"), *HEAD], "reads (32,) of node"
    ),
    "gemm over maps": ([node("Gemm", ["x", "M"], "y")], "reads (2, 4, 4)"),
    "product over maps": ([node("MatMul", ["x", "M"], "y")], "reads (2, 4, 4)"),
    "reshape": ([node("Reshape", ["x", "S"], "h"), *HEAD], "to [4, 8]"),
    "map as output": ([node("Relu", ["x"], "y")], "not of shape [N, classes]"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_understood_is_named(case: str) -> None:
    nodes, hint = REFUSED[case]
    constants = {"W": floats(3, 32), "K": floats(2, 2, 3, 3), "M": floats(4, 4), "S": np.array([4, 8])}
    if case == "random weights":
        del constants["W"]
    with pytest.raises(UserError) as error:
        read_onnx(model(nodes, constants).SerializeToString())
    assert hint in str(error.value)


def test_inputs_and_outputs_that_do_not_fit() -> None:
    nodes = [node("Flatten", ["x"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]
    constants = {"W": floats(3, 32)}
    with pytest.raises(UnsupportedGraphError, match=r"\['N', 2, 'H', 4\]"):
        read_onnx(model(nodes, constants, ("N", 2, "H", 4)).SerializeToString())
    two = model(nodes, constants)
    two.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 2]))
    with pytest.raises(UnsupportedGraphError, match=r"\['x', 'z'\]"):
        read_onnx(two.SerializeToString())
    two = model(nodes, constants)
    two.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", 32]))
    with pytest.raises(UnsupportedGraphError, match="2 outputs"):
        read_onnx(two.SerializeToString())
    with pytest.raises(UserError, match="do not fit together"):
        read_onnx(model(nodes, {"W": floats(3, 31)}).SerializeToString())


def test_ambiguous_files_are_refused() -> None:
    nodes = [node("Flatten", ["x"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]
    twice = model(nodes, {"W": floats(3, 32)})
    twice.graph.initializer.append(numpy_helper.from_array(floats(3, 32), "W"))
    with pytest.raises(UserError, match="W"):
        read_onnx(twice.SerializeToString())
    old = model(nodes, {"W": floats(3, 32), "w": floats(3)})
    old.graph.node[1].input.append("w")
    old.opset_import[0].version = 8
    with pytest.raises(UnsupportedGraphError, match="opset 8; expected 9 or newer"):
        read_onnx(old.SerializeToString())


def test_external_data_is_refused_and_no_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(floats(3, 32).tobytes())
    proto = model([node("Flatten", ["x"], "f"), node("Gemm", ["f", "W"], "y", transB=1)], {"W": floats(3, 32)})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(tmp_path / "secret"))
    with pytest.raises(UserError, match="'W' lies in another file"):
        read_onnx(proto.SerializeToString())


def test_constants_that_would_fill_the_memory_are_refused() -> None:
    nodes = [
        node("ConstantOfShape", ["big"], "W"),
        node("Flatten", ["x"], "f"),
        node("Gemm", ["f", "W"], "y", transB=1),
    ]
    with pytest.raises(UserError, match="1000000000000 elements"):
        read_onnx(model(nodes, {"big": np.array([10**6, 10**6])}).SerializeToString())
    nodes[0] = node("Mul", ["row", "column"], "W")
    constants = {"row": floats(1, 40_000), "column": floats(40_000, 1)}
    with pytest.raises(UserError, match="1600000000 elements"):
        read_onnx(model(nodes, constants).SerializeToString())
    nodes = [node("Identity", ["big"], "size"), node("ConstantOfShape", ["size"], "W"), *nodes[1:]]
    with pytest.raises(UserError, match="cannot be foreseen"):
        read_onnx(model(nodes, {"big": np.array([10**6, 10**6])}).SerializeToString())


def test_layers_that_would_fill_the_memory_are_refused() -> None:
    nodes = [node("Conv", ["x", "K"], "h", pads=[1_000_000] * 4), *HEAD]
    with pytest.raises(UserError, match=r"Conv .*elements; at most"):
        read_onnx(model(nodes, {"K": floats(2, 2, 3, 3), "W": floats(3, 32)}).SerializeToString())
    with pytest.raises(UserError, match=r"'x' is \['N', 1000000, 1000000, 1000000\]"):
        read_onnx(model(REFUSED["alpha"][0], {"W": floats(3, 32)}, ("N", 10**6, 10**6, 10**6)).SerializeToString())


@pytest.mark.parametrize("level", ["dense", "prune:gu-l1:0.9+int4"])
def test_truncated_files(level: str) -> None:
    data = onnx_bytes(deployable.compressed("mlp", level), deployable.INFO)
    for length in sorted({0, 1, 2, 7, *range(10, len(data), max(1, len(data) // 60)), len(data) - 1}):
        with pytest.raises(UserError):
            read_onnx(data[:length])


def test_damaged_files_never_end_in_anything_but_a_clear_error() -> None:
    data = onnx_bytes(deployable.compressed("mlp", "prune:gu-l1:0.9+int4"), deployable.INFO)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] = generator.integers(256)
        try:
            read_onnx(bytes(damaged))
        except UserError:
            refused += 1
    assert refused > 10


def test_files_that_are_not_there_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.onnx: cannot be read"):
        read_onnx(tmp_path / "nothing.onnx")
    path = tmp_path / "text.onnx"
    path.write_text("this is no network")
    with pytest.raises(UserError, match=r"text\.onnx: not an ONNX file"):
        read_onnx(path)
    with pytest.raises(UserError, match="onnxruntime cannot load"):
        run.session(b"this is no network")


def test_a_path_reads_like_its_bytes(tmp_path: Path) -> None:
    data = onnx_bytes(deployable.compressed("residual", "int8"), deployable.INFO)
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    (first, _, _), (second, _, _) = read_onnx(path), read_onnx(data)
    assert first == second


def test_logits_are_the_same_at_every_run_and_batch() -> None:
    data = onnx_bytes(deployable.compressed("cnn_small", "int8"), deployable.INFO)
    x = deployable.images(20)
    assert torch.equal(run.logits(data, x), run.logits(data, x))
    assert (run.logits(data, x, batch=3) - run.logits(data, x)).abs().max() < 1e-5
    with pytest.raises(UserError, match="onnxruntime cannot run"):
        run.logits(data, torch.rand(2, 3, 8, 8))
