"""Files that other tools write: every operator against onnxruntime, layouts, and what is refused."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_read import HEAD, floats, model, node
from torch import Tensor, nn

from cactus_ray.bounds.graph import forward
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.interchange import run
from cactus_ray.interchange.read import OnnxNetwork, read_network, read_onnx
from cactus_ray.interchange.write import onnx_bytes


def read_and_compare(data: bytes) -> OnnxNetwork:
    """Reads a file and compares it with onnxruntime, one sample at a time."""
    network = read_network(data)
    session = run.session(data)
    name = session.get_inputs()[0].name
    values = torch.rand(6, math.prod(network.shape), generator=torch.Generator().manual_seed(0)) * 3 - 1
    points = network.from_file(values)
    assert torch.equal(network.to_file(points), values)
    ours = forward(network.graph, network.params, points.double())
    for value, output in zip(values, ours, strict=True):
        (theirs,) = run.run(session, {name: value.reshape(network.shape).numpy()})
        assert theirs.shape == network.output
        expected = torch.from_numpy(theirs).flatten()
        torch.testing.assert_close(output.float(), expected, rtol=1e-4, atol=1e-5)
    assert all(p.dtype == torch.float64 for p in network.params.values())
    return network


def operators(network: OnnxNetwork) -> list[str]:
    return [n.op for n in network.graph.nodes[1:]]


def dense(shape: Sequence[object], nodes: Sequence[onnx.NodeProto], **constants: np.ndarray) -> OnnxNetwork:
    return read_and_compare(model(nodes, constants, shape).SerializeToString())


def test_constants_on_either_side() -> None:
    nodes = [
        node("Sub", ["x", "m"], "a"),
        node("Div", ["a", "s"], "b"),
        node("Sub", ["one", "b"], "c"),
        node("Mul", ["two", "c"], "h"),
        *HEAD,
    ]
    network = dense(
        ("N", 2, 4, 4), nodes, m=floats(2, 1, 1), s=np.abs(floats(1, 2, 1, 1)) + 0.5, one=np.array(1, np.float32),
        two=floats(2, 1, 1), W=floats(3, 32),
    )  # fmt: skip
    assert operators(network) == ["scale_shift"] * 4 + ["flatten", "linear"]


def test_a_constant_per_feature_and_per_pixel() -> None:
    nodes = [node("Sub", ["x", "m"], "h"), node("Div", ["h", "s"], "g"), node("Flatten", ["g"], "f")]
    gemm = node("Gemm", ["f", "W"], "y", transB=1)
    constants = {"m": floats(2, 4, 4), "s": np.abs(floats(4)) + 0.5, "W": floats(3, 32)}
    assert operators(dense((1, 2, 4, 4), [*nodes, gemm], **constants)) == [
        "flatten", "scale_shift", "scale_shift", "linear",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(5,), (1, 5), ("N", 5), (1, 1, 1, 5), (1, 5, 1, 1)])
def test_inputs_of_every_shape(shape: Sequence[object]) -> None:
    rank = len(shape)
    nodes = [node("Reshape", ["x", "flat"], "f"), node("MatMul", ["f", "V"], "m"), node("Add", ["m", "v"], "a")]
    nodes += [node("Relu", ["a"], "r"), node("Gemm", ["r", "W"], "y", transB=1)]
    constants = {"flat": np.array([-1, 5]), "V": floats(5, 4), "v": floats(4), "W": floats(3, 4)}
    if rank == 1:
        nodes[0] = node("Unsqueeze", ["x", "zero"], "f")
        constants["zero"] = np.array([0])
    network = dense(shape, nodes, **constants)
    assert [op for op in operators(network) if op != "flatten"] == ["linear", "relu", "linear"]
    assert network.shape == ((5,) if rank == 1 else (1, *shape[1:]))


def test_vectors_without_a_batch() -> None:
    nodes = [node("MatMul", ["x", "V"], "m"), node("Add", ["m", "v"], "a"), node("LeakyRelu", ["a"], "y", alpha=0.25)]
    network = dense((5,), nodes, V=floats(5, 4), v=floats(4))
    assert operators(network) == ["linear", "leaky_relu"]
    assert network.output == (4,)
    with pytest.raises(UnsupportedGraphError, match=r"input \[5\]"):
        read_onnx(model(nodes, {"V": floats(5, 4), "v": floats(4)}, (5,)).SerializeToString())


def test_matrices_times_columns() -> None:
    nodes = [node("MatMul", ["V", "x"], "m"), node("Add", ["m", "v"], "a"), node("Relu", ["a"], "r")]
    nodes += [node("MatMul", ["W", "r"], "y")]
    network = dense((1, 5, 1), nodes, V=floats(4, 5), v=floats(4, 1), W=floats(3, 4))
    assert operators(network) == ["flatten", "linear", "relu", "linear"]


def test_flat_and_channel_last_inputs_of_convolutions() -> None:
    conv = [node("Conv", ["i", "K", "k"], "c", pads=[1, 1, 1, 1]), node("Relu", ["c"], "r")]
    constants = {"K": floats(4, 2, 3, 3), "k": floats(4), "W": floats(3, 64), "map": np.array([1, 2, 4, 4])}
    head = [node("Flatten", ["r"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]
    flat = dense((1, 32), [node("Reshape", ["x", "map"], "i"), *conv, *head], **constants)
    assert flat.graph.input_shape == (2, 4, 4)
    assert torch.equal(flat.order, torch.arange(32))
    last = [node("Mul", ["x", "s"], "t"), node("Transpose", ["t"], "i", perm=[0, 3, 1, 2])]
    # behind the convolution channels are last again, so the dense layer's columns are in that order
    back = [node("Transpose", ["r"], "q", perm=[0, 2, 3, 1]), node("Add", ["q", "b"], "p"), node("Relu", ["p"], "g")]
    tail = [node("Flatten", ["g"], "f"), node("Gemm", ["f", "W"], "y", transB=1)]
    network = dense((1, 4, 4, 2), [*last, *conv, *back, *tail], s=floats(2), b=floats(4), **constants)
    assert network.graph.input_shape == (2, 4, 4)
    assert operators(network) == ["scale_shift", "conv2d", "relu", "scale_shift", "relu", "flatten", "linear"]
    with pytest.raises(UnsupportedGraphError, match=r"input \[1, 4, 4, 2\] as maps \[2, 4, 4\]"):
        read_onnx(model([*last, *conv, *back, *tail], constants | {"s": floats(2), "b": floats(4)}, (1, 4, 4, 2))
                  .SerializeToString())  # fmt: skip


def test_squeezing_pools_and_padding_like_the_input() -> None:
    nodes = [
        node("Conv", ["x", "K"], "c", auto_pad="SAME_UPPER", kernel_shape=[3, 3]),
        node("LeakyRelu", ["c"], "r"),
        node("AveragePool", ["r"], "a", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
        node("GlobalAveragePool", ["a"], "g"),
        node("Squeeze", ["g", "last"], "s"),
        node("Unsqueeze", ["s", "two"], "u"),
        node("Identity", ["u"], "i"),
        node("Reshape", ["i", "flat"], "h"),
        node("BatchNormalization", ["h", "one", "b", "b", "v"], "n"),
        node("Gemm", ["n", "W", "w"], "y"),
    ]
    network = dense(
        (1, 2, 5, 5), nodes, K=floats(4, 2, 3, 3), last=np.array([2, 3]), two=np.array([2]), flat=np.array([1, -1]),
        one=floats(4), b=floats(4), v=np.abs(floats(4)) + 0.5, W=floats(4, 3), w=floats(3),
    )  # fmt: skip
    assert operators(network) == [
        "conv2d", "leaky_relu", "avg_pool2d", "avg_pool2d", "flatten", "batch_norm", "linear",
    ]  # fmt: skip


def test_residual_sums_and_differences() -> None:
    nodes = [
        node("Conv", ["x", "K"], "c", pads=[1, 1, 1, 1]),
        node("Add", ["c", "x"], "a"),
        node("Relu", ["a"], "r"),
        node("Sub", ["r", "x"], "h"),
        *HEAD,
    ]
    network = dense((1, 2, 4, 4), nodes, K=floats(2, 2, 3, 3), W=floats(3, 32))
    assert operators(network) == ["conv2d", "add", "relu", "scale_shift", "add", "flatten", "linear"]


def test_quantised_weights_are_read_and_quantised_activations_of_others_refused() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (3, 5)).astype(np.int8)
    scale = np.array(0.1, np.float32)
    nodes = [node("DequantizeLinear", ["q", "s"], "W"), node("Gemm", ["x", "W"], "y", transB=1)]
    network = dense((1, 5), nodes, q=codes, s=scale)
    (weight,) = network.params.values()
    assert torch.equal(weight.float(), torch.from_numpy(codes).float() * torch.tensor(scale))
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "c"), node("DequantizeLinear", ["c", "s", "z"], "h"), *HEAD]
    proto = model(nodes, {"s": scale, "z": np.array(0, np.uint8), "W": floats(3, 5)}, (1, 5))
    with pytest.raises(UnsupportedGraphError, match=r"Gemm .*its weight 'W' is not dequantised"):
        read_network(proto.SerializeToString())


def test_a_division_that_float32_cannot_hold_is_only_read_in_float64() -> None:
    nodes = [node("Div", ["x", "s"], "d"), node("Gemm", ["d", "W"], "y", transB=1)]
    network = dense((1, 2), nodes, s=np.array([3, 7], np.float32), W=floats(3, 2))
    (scale,) = (p for name, p in network.params.items() if name.endswith("scale"))
    assert torch.equal(scale, 1 / torch.tensor([3, 7], dtype=torch.float64))
    proto = model(nodes, {"s": np.array([3, 7], np.float32), "W": floats(3, 2)}, (1, 2))
    with pytest.raises(UnsupportedGraphError, match="reciprocal"):
        read_onnx(proto.SerializeToString())
    exact = model(nodes, {"s": np.array([2, 0.25], np.float32), "W": floats(3, 2)}, (1, 2))
    assert read_onnx(exact.SerializeToString())[1]


M = {"W": floats(3, 32), "K": floats(2, 2, 3, 3), "M": floats(4, 4), "zeros": np.zeros(1, np.float32)}
REFUSED: dict[str, tuple[Sequence[object], list[onnx.NodeProto], str]] = {
    "an empty batch": ((0, 2, 4, 4), [node("Relu", ["x"], "h"), *HEAD], r"expected one sample"),
    "a batch of two": ((2, 2, 4, 4), [node("Relu", ["x"], "h"), *HEAD], r"\[2, 2, 4, 4\]; expected one sample"),
    "Softmax": ((1, 2, 4, 4), [node("Flatten", ["x"], "f"), node("Softmax", ["f"], "y")], "'Softmax'"),
    "Clip": ((1, 2, 4, 4), [node("Clip", ["x"], "h"), *HEAD], "'Clip'"),
    "a slope above 1": ((1, 2, 4, 4), [node("LeakyRelu", ["x"], "h", alpha=2.0), *HEAD], "alpha = 2.0"),
    "a slope below 0": ((1, 2, 4, 4), [node("LeakyRelu", ["x"], "h", alpha=-0.5), *HEAD], "alpha = -0.5"),
    "constant by value": ((1, 2, 4, 4), [node("Div", ["zeros", "x"], "h"), *HEAD], "Div .*of a constant by a value"),
    "division by zero": ((1, 2, 4, 4), [node("Div", ["x", "zeros"], "h"), *HEAD], "by zero"),
    "product": ((1, 2, 4, 4), [node("Mul", ["x", "x"], "h"), *HEAD], "Mul .*two values"),
    "larger constant": ((1, 1, 4, 4), [node("Add", ["x", "K"], "h"), *HEAD], "broadcasts"),
    "transposed sum": (
        (1, 2, 4, 4),
        [node("Transpose", ["x"], "t", perm=[0, 1, 3, 2]), node("Add", ["x", "t"], "h"), *HEAD],
        "Add .*a transposed one",
    ),
    "maps out of features": (
        (1, 32),
        [node("Gemm", ["x", "S"], "g"), node("Reshape", ["g", "map"], "m"), node("Conv", ["m", "K"], "h"), *HEAD],
        r"Conv .*reads \(32,\) of node",
    ),
    "two layouts": (
        (1, 2, 4, 4),
        [node("Conv", ["x", "K"], "a"), node("Transpose", ["x"], "t", perm=[0, 1, 3, 2]), node("Conv", ["t", "K"], "b"),
         node("Add", ["a", "b"], "h"), *HEAD],
        "reshaped or transposed",
    ),
    "mixed samples": (("N", 2, 4, 4), [node("Reshape", ["x", "mix"], "h"), *HEAD], "Reshape .*keeps the batch"),
    "transposed batch": (("N", 2, 4, 4), [node("Transpose", ["x"], "h", perm=[1, 0, 2, 3]), *HEAD], "perm = "),
    "transposed output": (
        (1, 2, 4, 4), [node("Conv", ["x", "K"], "c"), node("Transpose", ["c"], "y", perm=[0, 2, 3, 1])], "transposed",
    ),
    "one-dimensional": ((1, 2, 16), [node("MaxPool", ["x"], "h", kernel_shape=[2]), *HEAD], "2-D kernel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str) -> None:
    shape, nodes, hint = REFUSED[case]
    constants = M | {"S": floats(32, 32), "map": np.array([1, 2, 4, 4]), "mix": np.array([-1, 16])}
    with pytest.raises(UserError, match=hint):
        read_network(model(nodes, constants, shape).SerializeToString())


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.head = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Linear(64, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem((x - 0.25) / 0.5)))
        x = self.pool(nn.functional.leaky_relu(self.block(x) + x, 0.1))
        return self.head(x.view(1, -1))


def test_what_torch_exports() -> None:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(Torch().eval(), (torch.rand(1, 1, 8, 8),), buffer, dynamo=False)
        except (ImportError, RuntimeError, TypeError) as error:
            pytest.skip(f"torch's exporter does not run here: {error}")
    network = read_and_compare(buffer.getvalue())
    assert "leaky_relu" in operators(network)


def test_files_of_our_own_are_the_same_whatever_the_order_of_the_tensors() -> None:
    import deployable

    compressed = deployable.compressed("residual", "prune:gu-l1:0.9+int4")
    expected = onnx_bytes(compressed, deployable.INFO)
    stored = dict(reversed(compressed.stored.items()))
    assert onnx_bytes(type(compressed)(compressed.level, compressed.graph, stored), deployable.INFO) == expected
    assert numpy_helper.to_array(onnx.load_model_from_string(expected).graph.initializer[0]).size
