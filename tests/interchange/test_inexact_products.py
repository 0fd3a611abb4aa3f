"""Products of integers in which onnxruntime is another function than the file.

Those of uint8 and int8 codes: x86 CPUs without VNNI add them in pairs and saturate in 16 bits. Those of float inputs
and unpacked integers: MatMulNBits rounds the inputs to 8 bits. Files in which that may happen are refused by name; on
what is read, onnxruntime is exact at the ends of the range.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foreign import OUT, UNIT, one_layer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from cactus_ray import cli
from cactus_ray.bounds.answers import possible_answers
from cactus_ray.deploy.replay import runner
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.read import read_network

KERNELS = {"Gemm": "QGemm", "columns": "QGemm", "MatMul": "MatMulIntegerToFloat", "Conv": "QLinearConv"}
ZEROS = [np.uint8(0), np.uint8(128), np.int8(0), np.int8(-128)]
FITTING = np.array([[64, 64, -64, -64, 64, -64], [127, 1, 1, -128, 0, 0], [0, -38, -90, 90, 38, 38]], np.int8)
SATURATING = {
    "65 and 64": [65, 64, 0, 0, 0, 0],
    "-65 and -64": [-64, -65, 9, 9, 0, 0],
    "127 and 127": [0, 1, -128, -128, 127, 127],
}


def ends(zero: np.integer[Any], inputs: int) -> Tensor:
    """All images [2 ** inputs, inputs] whose codes are the least or the largest."""
    limits = np.iinfo(zero.dtype)
    values = [(limits.min - int(zero)) * UNIT, (limits.max - int(zero)) * UNIT]
    return torch.tensor(list(itertools.product(values, repeat=inputs)))


def answers(file: bytes, images: Tensor) -> Tensor:
    return runner(file)(shaped(file, images))


def shaped(file: bytes, images: Tensor) -> Tensor:
    sizes = onnx.load_model_from_string(file).graph.input[0].type.tensor_type.shape.dim
    return images.reshape(len(images), *(d.dim_value for d in sizes[1:]))


def exact(images: Tensor, codes: NDArray[Any], weight_zero: int = 0) -> Tensor:
    """Sums of at most 24 bits, times a power of two: float32 holds them."""
    return (images.double() @ (torch.from_numpy(codes).double() - weight_zero).T * UNIT).float()


def kernels(file: bytes, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
@pytest.mark.parametrize("op", KERNELS)
def test_codes_that_fit_are_read_and_exact_in_onnxruntime(op: str, zero: np.integer[Any], tmp_path: Path) -> None:
    images = ends(zero, 6)
    unsigned = (FITTING.astype(np.int16) + 128).astype(np.uint8), np.full((3, 6), 255, np.uint8)
    for codes, weight_zero in ((FITTING, 0), (FITTING, 3), (unsigned[0], 128), (unsigned[1], 0)):
        file = one_layer(op, codes, zero, weight_zero=weight_zero)
        assert KERNELS[op] in kernels(file, tmp_path)
        read = read_network(file)
        found = answers(file, images)
        box = possible_answers(read.graph, read.params, shaped(file, images))
        assert bool(((found >= box.lower) & (found <= box.upper)).all())
        if op != "Conv":  # whose outputs are quantised
            assert torch.equal(found, exact(images, codes, weight_zero))


@pytest.mark.parametrize("pair", SATURATING)
@pytest.mark.parametrize("zero", ZEROS[::3], ids=repr)
@pytest.mark.parametrize("op", KERNELS)
def test_a_pair_that_may_saturate_is_refused_by_name(op: str, zero: np.integer[Any], pair: str) -> None:
    codes = np.array([[1] * 6, SATURATING[pair], [0] * 6], np.int8)
    words = rf"\(output 'y'\).*'w' holds the int8 codes {pair} in one output channel.* or uint8 codes"
    with pytest.raises(UnsupportedGraphError, match=words):
        read_network(one_layer(op, codes, zero))


def test_onnxruntime_does_what_is_refused() -> None:
    """Why, of int8 inputs too: outputs differ from the sums of their products, by as little as 128 in 32895."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx2" not in flags or "vnni" in flags:
        pytest.skip("no x86 CPU with AVX2 and without VNNI")
    codes = np.array(list(SATURATING.values()), np.int8)
    for op, zero in itertools.product(KERNELS, ZEROS):
        images = ends(zero, 6)
        found, true = answers(one_layer(op, codes, zero), images), exact(images, codes)
        if op == "Conv":  # its outputs are quantised, so only the last of them differs by more than a step
            wrong = (found - true.clamp(-128 * OUT, 127 * OUT)).abs()[:, 2:] / OUT
            assert float(wrong.max()) > 2, (op, zero)
        else:
            wrong = (found - true).abs() / UNIT**2
            assert float(wrong.amax(0).min()) >= 127, (op, zero)


def test_both_ways_to_verify_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, specification, out = tmp_path / "model.onnx", tmp_path / "spec.vnnlib", tmp_path / "out"
    codes = np.zeros((10, 64), np.int8)
    lines = [f"(declare-const X_{i} Real)\n(assert (>= X_{i} 0))\n(assert (<= X_{i} 0.01))" for i in range(64)]
    lines += [*(f"(declare-const Y_{j} Real)" for j in range(10)), "(assert (<= Y_0 -1))"]
    specification.write_text("\n".join(lines))
    for largest, status in ((64, 0), (127, 2)):
        codes[0, :2] = largest
        model.write_bytes(one_layer("MatMul", codes, np.uint8(0), image=(1, 8, 8)))
        for arguments in (
            ["--data", "digits", "--epsilon", "0.1", "--samples", "2", "--json"],
            ["--vnnlib", str(specification), "--out", str(out)],
        ):
            assert cli.run(["verify", str(model), *arguments]) == status
            shown = capsys.readouterr()
            assert ("'w' holds the int8 codes 127 and 127 in one output channel" in shown.err) == (status == 2)
    assert out.read_text() == "unsat\n"  # of the file that was read


def unpacked(op: str, *, quantised: bool = False) -> bytes:
    """A product with int8 weights [64 inputs, 8 outputs] as DequantizeLinear unpacks them, of float inputs or codes."""
    codes = np.random.default_rng(0).integers(-60, 60, (64, 8)).astype(np.int8)
    rows = op in ("rows", "turned")
    tensors = {"w": codes.T.copy() if rows else codes, "s": np.float32([0.01] * 8), "z": np.zeros(8, np.int8)}
    tensors |= {"u": np.float32(0.01), "o": np.uint8(0), "shape": np.int64([-1, 64])}
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["W"], axis=0 if rows else 1)]
    value, weight = "x", "W"
    if quantised:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "u", "o"], ["c"]))
        nodes.append(helper.make_node("DequantizeLinear", ["c", "u", "o"], ["v"]))
        value = "v"
    if op == "flattened":
        nodes.append(helper.make_node("Reshape", [value, "shape"], ["f"]))
        value = "f"
    if op == "turned":
        nodes.append(helper.make_node("Transpose", ["W"], ["V"], perm=[1, 0]))
        weight = "V"
    kind = "Gemm" if op in ("columns", "rows") else "MatMul"
    nodes.append(helper.make_node(kind, [value, weight], ["y"], **({"transB": 1} if op == "rows" else {})))
    shape = ["N", 8, 8] if op == "flattened" else ["N", 64]
    graph = helper.make_graph(
        nodes, "unpacked", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return bytes(model.SerializeToString())


ROUNDED = [("MatMul", False), ("columns", False), ("turned", False), ("flattened", False), ("flattened", True)]


@pytest.mark.parametrize(("op", "quantised"), ROUNDED)
def test_inputs_that_may_be_rounded_to_8_bits_are_refused(op: str, quantised: bool) -> None:
    with pytest.raises(UnsupportedGraphError, match=r"unpacked from integers.*MatMulNBits.*Gemm with transB = 1"):
        read_network(unpacked(op, quantised=quantised))


@pytest.mark.parametrize(("op", "quantised"), [("rows", False), ("rows", True), ("MatMul", True), ("columns", True)])
def test_products_with_unpacked_integers_that_are_exact_are_read(op: str, quantised: bool, tmp_path: Path) -> None:
    file = unpacked(op, quantised=quantised)
    read = read_network(file)
    assert "MatMulNBits" not in kernels(file, tmp_path)
    images = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    box = possible_answers(read.graph, read.params, images)
    found = answers(file, images)
    assert bool(((found >= box.lower - 1e-5) & (found <= box.upper + 1e-5)).all())


@pytest.mark.parametrize("op", [op for op, quantised in ROUNDED if not quantised])
def test_onnxruntime_rounds_these_inputs(op: str, tmp_path: Path) -> None:
    """Why: a small pixel among larger ones becomes another."""
    file = unpacked(op)
    if "MatMulNBits" not in kernels(file, tmp_path):
        pytest.skip("this onnxruntime does not rewrite the product")
    images = torch.ones(2, 64)
    images[0, 0] = 0.02
    images[1, 0] = 0.0
    found = answers(file, images)
    exact = runner_without_rewriting(file)(shaped(file, images))
    small, none = (found - exact).abs().amax(1).tolist()
    assert none < 1e-5
    assert small > 1e-3


def runner_without_rewriting(file: bytes) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])
