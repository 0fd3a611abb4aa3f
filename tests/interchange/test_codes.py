"""Quantised activations in files: written, read back, run by onnxruntime in integers and in float32, and refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deployable import INFO
from foreign import Foreign, products
from onnx import helper, numpy_helper
from torch import Tensor

from cactus_ray.bounds import graph as graphs
from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.alpha import Search, alpha_margins
from cactus_ray.bounds.answers import possible_answers
from cactus_ray.bounds.graph import Node, forward
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange.read import read_network, read_onnx
from cactus_ray.interchange.write import onnx_bytes

sys.path.append(str(Path(__file__).parents[1] / "bounds"))
from containment import points_of
from quantised_networks import KINDS, beside_ties, examples, integers, narrow, on_the_grid
from small_networks import network

Level = onnxruntime.GraphOptimizationLevel
WAYS = {"fused": Level.ORT_ENABLE_ALL, "unfused": Level.ORT_DISABLE_ALL}


def runs(file: bytes, images: Tensor, level: Level, optimized: Path | None = None) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = level, 4, 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def kernels(file: bytes, folder: Path) -> list[str]:
    """The operators that onnxruntime really runs."""
    shape = [d.dim_value or 1 for d in onnx.load_model_from_string(file).graph.input[0].type.tensor_type.shape.dim]
    runs(file, torch.zeros(shape), Level.ORT_ENABLE_ALL, folder / "optimized.onnx")
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def excess(file: bytes, images: Tensor, epsilon: float) -> dict[str, float]:
    """By way of running: how far a margin that onnxruntime computes in the balls is below what is claimed, at most."""
    graph, params, _ = read_onnx(file)
    wide = {k: v.double() for k, v in params.items()}
    labels = torch.arange(len(images)) % 3
    charged, box = Rounding.of(graph, wide, "float32"), interval.ball(images.double(), epsilon, (0.0, 1.0))
    nothing = torch.full((len(images), 3), -torch.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    keep: Any = {"known": nothing, "rounding": charged}
    claimed = [
        interval.margins(graph, wide, box, labels, rounding=charged),
        linear.crown_margins(graph, wide, box, labels, **keep),
        alpha_margins(graph, wide, box, labels, how=Search(4, target=torch.inf), **keep).lower,
    ]
    points = [images] if epsilon == 0 else points_of(images, epsilon, 4, 0)
    found = dict.fromkeys(WAYS, -torch.inf)
    for point in points:
        for way, level in WAYS.items():
            logits = runs(file, point.clamp(0, 1), level).double()
            true = logits.gather(1, labels[:, None]) - logits
            found[way] = max(found[way], *(float((lower - true).max()) for lower in claimed))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_of_running_stay_inside_the_bounds(kind: str) -> None:
    near = beside_ties(kind)
    cases = (integers(kind), examples(24)), (narrow(kind, 1), examples(24, 1)), (near, on_the_grid(near, 24))
    for made, images in cases:
        file = onnx_bytes(made, INFO)
        for epsilon in (0.0, 0.03):
            assert max(excess(file, images, epsilon).values()) <= 0, epsilon


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_possible_ones(kind: str) -> None:
    made = beside_ties(kind, 2)
    images, file = on_the_grid(made, 64, 2), onnx_bytes(made, INFO)
    box = possible_answers(made.graph, made.params, images)
    assert float((box.upper - box.lower).max()) > 1e-3  # beside ties
    for level in WAYS.values():
        logits = runs(file, images, level)
        assert bool(((logits >= box.lower) & (logits <= box.upper)).all())


def test_the_two_ways_differ_by_whole_codes_beside_ties() -> None:
    made = beside_ties("conv", 2)
    images, file = on_the_grid(made, 64, 2), onnx_bytes(made, INFO)
    first, second = (runs(file, images, level) for level in WAYS.values())
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_read_as_it_was_written(kind: str) -> None:
    made = integers(kind)
    graph, params, metadata = read_onnx(onnx_bytes(made, INFO))
    assert metadata["cactus_ray.level"] == "w8a8"
    assert [(n.op, dict(n.attributes)) for n in graph.nodes] == [(n.op, dict(n.attributes)) for n in made.graph.nodes]
    images = examples(16, 5)
    torch.testing.assert_close(forward(graph, params, images), forward(made.graph, made.params, images), rtol=0, atol=0)
    for node in made.graph.weighted():
        assert torch.equal(params[f"{node.name}.weight"], made.params[f"{node.name}.weight"])


@pytest.mark.parametrize("sparsity", ["0.5", "0.9", "0.99"])
def test_sparse_weights_are_stored_as_such_and_still_run_in_integers(sparsity: str, tmp_path: Path) -> None:
    graph, params = network("mlp", 0)
    params = {k: v.repeat(8, 1) if v.dim() == 2 and len(v) == 9 else v for k, v in params.items()}
    params = {k: v.repeat(8) if k.endswith("bias") and len(v) == 9 else v for k, v in params.items()}
    first, second, _ = graph.weighted()
    params[f"{second.name}.weight"] = params[f"{second.name}.weight"].repeat(1, 8)
    data = examples(40), torch.arange(40) % 3
    made = materialize(graph, params, parse_level(f"prune:gu-l1:{sparsity}+w8a8"), data)
    file = onnx_bytes(made, INFO)
    assert len(file) < len(onnx_bytes(materialize(graph, params, parse_level("w8a8"), data), INFO))
    _, read, _ = read_onnx(file)
    assert torch.equal(read[f"{first.name}.weight"], made.params[f"{first.name}.weight"])
    assert kernels(file, tmp_path).count("QGemm") == 3


def test_onnxruntime_really_computes_in_integers(tmp_path: Path) -> None:
    assert {"QLinearConv", "QGemm"} <= set(kernels(onnx_bytes(integers("conv"), INFO), tmp_path))
    assert "Conv" not in kernels(onnx_bytes(integers("conv"), INFO), tmp_path)
    assert "QLinearAdd" in kernels(onnx_bytes(integers("residual"), INFO), tmp_path)
    assert "QLinearAveragePool" in kernels(onnx_bytes(integers("padded average pool"), INFO), tmp_path)


def half_up(node: Node, x: Tensor) -> Tensor:
    low, high = graphs.code_range(node)
    return torch.floor(x / node["scale"] + 0.5).clamp(low, high) * node["scale"]


def wrong_zero_point(node: Node, x: Tensor) -> Tensor:
    low, high = node["low"] - node["zero_point"] - 1, node["high"] - node["zero_point"] - 1
    return torch.round(x / node["scale"]).clamp(low, high) * node["scale"]


@pytest.mark.parametrize(("fault", "kind"), [(half_up, "conv"), (wrong_zero_point, "residual")])
def test_codes_are_those_of_onnxruntime_and_a_fault_shows(
    fault: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With powers of two as scales, ties are ties in every way of computing them: no rounding hides the rule."""
    made = beside_ties(kind, 0, odd=1.0)
    images, file = on_the_grid(made, 32), onnx_bytes(made, INFO)
    graph, params, _ = read_onnx(file)

    def apart() -> float:
        return float((forward(graph, params, images) - runs(file, images, WAYS["unfused"])).abs().max())

    assert apart() < 1e-5
    monkeypatch.setattr(graphs, "quantize", fault)
    assert apart() > 1e-3


# --- files of other tools --------------------------------------------------------------------------------------------


def test_a_foreign_file_is_read_and_both_ways_of_running_it_are_possible() -> None:
    file = Foreign().file()
    read = read_network(file)
    images = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 3
    box = possible_answers(read.graph, read.params, images)
    for level in WAYS.values():
        logits = runs(file, images, level)
        assert bool(((logits >= box.lower) & (logits <= box.upper)).all())
    assert [n.op for n in read.graph.nodes] == ["input", "quantize", "linear", "relu", "quantize"]
    assert read.graph.nodes[1].attributes == {"scale": float(np.float32(0.01)), "zero_point": 3, "low": 0, "high": 255}
    signed = read_network(Foreign(zero=np.int8(-5), behind=[]).file())
    assert (signed.graph.nodes[1]["zero_point"], signed.graph.nodes[1]["low"]) == (-5, -128)
    assert read_network(Foreign(bias=None).file()).graph.output.op == "quantize"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dynamic": True}, "DynamicQuantizeLinear.*only static scales"),
    ({"scale of the image": True}, "QuantizeLinear.*its scale depends on the image"),
    ({"other scale": np.float32(0.02)}, "DequantizeLinear.*reads codes of 'the codes' with"),
    ({"scale": np.float32(0.0)}, "QuantizeLinear.*scale 0.0"),
    ({"scale": np.float32(-0.01)}, "QuantizeLinear.*scale -0.0"),
    ({"scale": np.float32([0.1] * 4), "zero": np.uint8([3] * 4)}, "QuantizeLinear.*expected one for the whole tensor"),
    ({"zero": np.uint16(3)}, "QuantizeLinear.*another type than uint8 and int8"),
    ({"codes to the layer": True}, "Relu.*on the codes of 'the codes'"),
    ({"weight": np.ones((3, 4), np.float32)}, "its weight 'weight' is not dequantised from 8-bit integers"),
    ({"bias": np.ones(3, np.float32)}, "its bias 'bias' is not dequantised from int32 integers"),
    ({"units": np.float32([0.5, 0.25, 0.125])}, "the scale of its bias is not that of its inputs times"),
    ({"weight scale": np.float32([0.5, 0.25, 1e-20])}, "expected scales between"),
    ({"bias": np.array([2**31 - 1, 0, 0], np.int32)}, "sums of its integers may reach"),
    ({"weight": np.full((3, 4), 65, np.int8)}, "Gemm.*'weight codes' holds the int8 codes 65 and 65 in one output"),
    ({"product": "MatMul"}, "MatMul.*its weight 'columns' is not dequantised"),
    ({"behind": ["QuantizeLinear"]}, "are codes; expected DequantizeLinear"),
    ({"behind": ["QuantizeLinear", "DequantizeLinear", "Relu", "QuantizeLinear", "DequantizeLinear"]}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED[:-1], ids=lambda v: str(v)[:40])
def test_what_is_another_function_when_fused_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=message):
        read_network(Foreign(**changes).file())


def test_quantisers_that_a_runtime_would_merge_are_refused() -> None:
    read_network(Foreign(**REFUSED[-1][0]).file())  # the same numbers twice: nothing changes
    model = onnx.load_model_from_string(Foreign(**REFUSED[-1][0]).file())
    for tensor in model.graph.initializer:
        if tensor.name == "step 3":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.3), "step 3"))
    for tensor in model.graph.initializer:
        if tensor.name == "step 4":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.3), "step 4"))
    with pytest.raises(UnsupportedGraphError, match="rounds what 'the behind 0' has rounded already"):
        read_network(model.SerializeToString())


def test_onnxruntime_does_what_is_refused(tmp_path: Path) -> None:
    """Why: a floating-point bias is rounded, and the scale of an integer bias ignored, once a layer is fused."""
    images = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) * 3
    for changes in ({"bias": np.float32([0.0031, 0.0017, 0.0009])}, {"units": np.float32([0.5, 0.25, 0.125])}):
        file = Foreign(**changes).file()
        assert "QGemm" in kernels(file, tmp_path)
        first, second = (runs(file, images, level) for level in WAYS.values())
        assert float((first - second).abs().max()) > 0


def test_products_are_read_but_not_an_addition_behind_them(tmp_path: Path) -> None:
    images = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) * 3
    read = read_network(products(addition=False))
    box = possible_answers(read.graph, read.params, images)
    for level in WAYS.values():
        answers = runs(products(addition=False), images, level)
        assert bool(((answers >= box.lower) & (answers <= box.upper)).all())
    assert "QLinearMatMul" in kernels(products(addition=False), tmp_path)
    with pytest.raises(UnsupportedGraphError, match="addition behind the product"):
        read_network(products(addition=True))
    assert "QGemm" in kernels(products(addition=True), tmp_path)  # why: the addition becomes a bias of integers


def test_a_quantised_constant_added_to_quantised_values_is_refused() -> None:
    model = onnx.load_model_from_string(Foreign(behind=[]).file())
    for nodes, expected in (([], None), (["DequantizeLinear"], "quantised constant")):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        place = [n.op_type for n in other.graph.node].index("Gemm")
        other.graph.initializer.append(numpy_helper.from_array(np.uint8([3]), "few"))
        other.graph.initializer.append(numpy_helper.from_array(np.float32([0.5]), "plain"))
        made = [helper.make_node(op, ["few", "scale", "zero"], ["constant"]) for op in nodes]
        made.append(helper.make_node("Mul", ["value", "constant" if nodes else "plain"], ["scaled"]))
        for node in reversed(made):
            other.graph.node.insert(place, node)
        other.graph.node[place + len(made)].input[0] = "scaled"
        if expected is None:
            assert "scale_shift" in [n.op for n in read_network(other.SerializeToString()).graph.nodes]
        else:
            with pytest.raises(UnsupportedGraphError, match=expected):
                read_network(other.SerializeToString())
