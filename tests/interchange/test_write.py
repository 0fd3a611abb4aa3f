import itertools
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import deployable
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cactus_ray.bounds.graph import Graph, Node, forward
from cactus_ray.bounds.trace import trace
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, Stored, materialize
from cactus_ray.compression.size import ideal_bits
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.interchange import encode, run
from cactus_ray.interchange.read import read_onnx
from cactus_ray.interchange.write import onnx_bytes


@pytest.mark.parametrize("kind", list(deployable.KINDS))
@pytest.mark.parametrize("level", deployable.LEVELS)
def test_the_file_is_the_network(kind: str, level: str) -> None:
    compressed = deployable.compressed(kind, level)
    data = onnx_bytes(compressed, deployable.INFO)
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    graph, params, _ = read_onnx(data)
    assert graph == compressed.graph
    assert set(params) == set(compressed.params)
    for name, tensor in compressed.params.items():
        assert params[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    x = deployable.images(9)
    logits = forward(compressed.graph, compressed.params, x)
    assert (run.logits(data, x, batch=4) - logits).abs().max() < 1e-4 * max(1.0, float(logits.abs().max()))


def test_same_network_same_bytes() -> None:
    first, second = (onnx_bytes(deployable.compressed("residual", "int4"), deployable.INFO) for _ in range(2))
    assert first == second


def test_metadata() -> None:
    data = onnx_bytes(deployable.compressed("batch norm", "prune:gu-l1:0.50+int8"), deployable.INFO)
    _, _, metadata = read_onnx(data)
    assert metadata == {
        "cactus_ray.level": "prune:gu-l1:0.5+int8",
        "cactus_ray.data": "digits",
        "cactus_ray.class_names": json.dumps(list(deployable.INFO.class_names)),
        "cactus_ray.input": "NCHW",
        "cactus_ray.domain": "[0.0, 1.0]",
        "cactus_ray.normalization": "inside",
    }
    _, _, metadata = read_onnx(onnx_bytes(deployable.compressed("mlp", "dense"), deployable.INFO))
    assert metadata["cactus_ray.normalization"] == "none"


def _size(level: str) -> int:
    return len(onnx_bytes(deployable.compressed("cnn_small", level), deployable.INFO))


def test_sizes_fall_with_the_level() -> None:
    sizes = [_size(level) for level in ("dense", "fp16", "int8", "int6", "int5", "int4", "int3", "ternary")]
    assert sizes == sorted(sizes, reverse=True)
    assert _size("bf16") == _size("fp16")
    assert _size("int4:tensor") < _size("int4") < _size("int4:affine")
    sizes = [_size(f"int{bits}:tensor:affine") for bits in (8, 6, 5, 4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    sizes = [_size(f"prune:gu-l1:{s}") for s in (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)]
    assert sizes == sorted(sizes, reverse=True)
    sizes = [_size(f"prune:gu-l1:{s}+int8") for s in (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("level", "share"),
    [
        ("fp16", 0.51),
        ("int8", 0.27),
        ("int4", 0.15),
        ("int4:affine", 0.16),
        ("int2:affine", 0.1),
        ("prune:gu-l1:0.95", 0.08),
    ],
)
def test_share_of_the_dense_file(level: str, share: float) -> None:
    assert _size(level) < share * _size("dense")


@pytest.mark.parametrize("level", deployable.LEVELS)
def test_overhead_of_the_file_is_small(level: str) -> None:
    compressed = deployable.compressed("cnn_small", level)
    assert len(onnx_bytes(compressed, deployable.INFO)) < ideal_bits(compressed) / 8 * 1.15 + 2500


@pytest.mark.parametrize("level", ["prune:gu-l1:0.9", "prune:lu-l1:0.95+int8", "prune:gu-l1:0.9+int4", "int3"])
def test_the_chosen_encodings_are_the_smallest(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = deployable.compressed("mlp", level)
    chosen = len(onnx_bytes(compressed, deployable.INFO))
    names = [f"{n.name}.weight" for n in compressed.graph.weighted()]
    sizes = []
    for plan in itertools.product(encode.ENCODINGS, repeat=len(names)):
        monkeypatch.setattr(encode, "choose", lambda _, plan=plan: dict(zip(names, plan, strict=True)))
        sizes.append(len(onnx_bytes(compressed, deployable.INFO)))
    assert chosen <= min(sizes) + 60


@pytest.mark.parametrize("encoding", encode.ENCODINGS)
@pytest.mark.parametrize("level", ["dense", *deployable.SOME_FORMATS])
@pytest.mark.parametrize("pattern", ["zeros", "full", "first", "last", "sparse", "very sparse"])
def test_every_encoding_is_exact(encoding: str, level: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, empty tensors of values, long gaps: also where ``choose`` would not use the encoding."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    nodes = [Node("input", "input"), Node("a", "linear", ("input",)), Node("b", "linear", ("a",))]
    for name, shape in (("a.weight", (13, 77)), ("b.weight", (3, 13))):
        weight = torch.randn(shape, generator=generator).flatten()
        kept = torch.zeros(weight.numel(), dtype=torch.bool)
        share = {"sparse": 0.1, "very sparse": 0.003, "full": 1.0}.get(pattern, 0.0)
        kept |= torch.rand(weight.numel(), generator=generator) < share
        kept[{"first": 0, "last": -1}.get(pattern, slice(0))] = True
        params[name] = (weight * kept).view(shape)
    compressed = materialize(Graph(tuple(nodes), (77,)), params, parse_level(level))
    monkeypatch.setattr(encode, "choose", lambda weights: dict.fromkeys(weights, encoding))
    graph, found, _ = read_onnx(onnx_bytes(compressed, deployable.INFO))
    assert graph == compressed.graph
    for name, tensor in compressed.params.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


@given(
    positions=st.sets(st.integers(0, 5000), max_size=60),
    bits=st.sampled_from([4, 6, 8]),
    multiple=st.sampled_from([1, 8]),
)
@settings(max_examples=100, deadline=None)
def test_gaps_lead_back_to_the_positions(positions: set[int], bits: int, multiple: int) -> None:
    wanted = np.array(sorted(positions), np.int64)
    found = encode.gaps(wanted, bits, multiple)
    reached = np.cumsum(found.distances.astype(np.int64))
    assert len(found.source) % multiple == 0
    assert found.distances.max(initial=0) < 2**bits
    assert reached[found.source >= 0].tolist() == wanted.tolist()
    assert found.source[found.source >= 0].tolist() == list(range(len(wanted)))


@given(values=st.lists(st.integers(0, 255), max_size=50), bits=st.integers(1, 8))
def test_packed_bits_read_back(values: list[int], bits: int) -> None:
    low = np.array(values, np.uint8) & np.uint8(2**bits - 1)
    packed = encode.pack_bits(low, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    stream = sum(int(byte) << (8 * i) for i, byte in enumerate(packed))
    assert [(stream >> (bits * i)) & (2**bits - 1) for i in range(len(values))] == low.tolist()


def test_a_linear_layer_over_maps_is_refused() -> None:
    graph, params = trace(nn.Sequential(nn.Linear(8, 3), nn.Flatten()), (1, 8, 8))
    with pytest.raises(UnsupportedGraphError, match=r"linear '0' reads \(1, 8, 8\)"):
        onnx_bytes(materialize(graph, params, parse_level("dense")), deployable.INFO)


def test_writing_loops_over_no_weights() -> None:
    """It is called for every trial and level: weights are handled as arrays, never one by one in Python.

    The lines that run are counted, not the seconds. A loop over the tenth of the weights that is left would show.
    """
    compressed = deployable.compressed("cnn_small", "prune:gu-l1:0.9+int6")
    weights = sum(tensor.numel() for tensor in compressed.params.values())
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal steps
        steps += event == "line"
        return count

    onnx_bytes(compressed, deployable.INFO)  # what is imported on first use is not counted
    before = sys.gettrace()
    sys.settrace(count)
    try:
        onnx_bytes(compressed, deployable.INFO)
    finally:
        sys.settrace(before)
    assert 0 < steps < weights / 5


def test_names_of_the_network_survive() -> None:
    stored = {"layers.0.fc.weight": Stored("float32", torch.ones(3, 4))}
    nodes = (Node("input", "input"), Node("layers.0.fc", "linear", ("input",)))
    graph, params, _ = read_onnx(
        onnx_bytes(Compressed(parse_level("dense"), Graph(nodes, (4,)), stored), deployable.INFO)
    )
    assert graph.output.name == "layers.0.fc"
    assert torch.equal(params["layers.0.fc.weight"], torch.ones(3, 4))
