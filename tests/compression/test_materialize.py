import math

import compressible
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.bounds.graph import Graph, Node, Params, forward
from cactus_ray.bounds.interval import ball, propagate
from cactus_ray.compression.calibration import gradients, recalibrate
from cactus_ray.compression.levels import FORMATS, INTEGER_INFERENCE, parse_level
from cactus_ray.compression.materialize import materialize, remove_channels
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.compression.quantize import step
from cactus_ray.compression.size import ideal_bits, macs
from cactus_ray.config import PRUNE_FAMILIES
from cactus_ray.errors import UserError
from cactus_ray.models.fold import fold_batch_norm

KINDS = list(compressible.KINDS)


@given(
    kind=st.sampled_from(KINDS), family=st.sampled_from([f for f in PRUNE_FAMILIES if f[1] == "s"]),
    sparsity=st.floats(0, 0.99), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_masked_and_removed_networks_agree(kind: str, family: str, sparsity: float, seed: int) -> None:
    graph, params = compressible.network(kind, seed)
    x = compressible.images(5, seed)
    found = masks(graph, params, family, sparsity, gradients(graph, params, x, torch.arange(5) % 3))
    masked = apply_masks(params, found)
    small_graph, small = remove_channels(graph, masked, found)
    assert (forward(graph, masked, x) - forward(small_graph, small, x)).abs().max() < 1e-10
    wide, narrow = (propagate(g, p, ball(x, 0.05, (0, 1))) for g, p in ((graph, masked), (small_graph, small)))
    assert (wide.lower - narrow.lower).abs().max() < 1e-10
    assert (wide.upper - narrow.upper).abs().max() < 1e-10
    removed = sum(v.numel() for v in params.values()) - sum(v.numel() for v in small.values())
    assert (removed > 0) == any(not mask.all() for mask in found.values())


def test_a_mask_of_the_filter_alone_would_leak() -> None:
    """The batch norm's constant outlives its filter; this is why masks reach further (and the test above is sharp)."""
    graph, params = compressible.network("batch norm")
    found = masks(graph, params, "ls-l1", 0.5)
    leaking = apply_masks(params, {k: m for k, m in found.items() if m.dim() > 1})
    small_graph, small = remove_channels(graph, apply_masks(params, found), found)
    x = compressible.images(5)
    assert (forward(graph, leaking, x) - forward(small_graph, small, x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["dense", "prune:gu-l1:0.5", "prune:gs-l2:0.5", "prune:gs-l2:0.5+rebn", "rebn"])
def test_levels_without_rounding_keep_the_function(kind: str, text: str) -> None:
    graph, params = compressible.network(kind, dtype=torch.float32)
    x, labels = compressible.images(20, dtype=torch.float32), torch.arange(20) % 3
    level = parse_level(text)
    expected = params
    if level.prune_family is not None and level.sparsity is not None:
        expected = apply_masks(params, masks(graph, params, level.prune_family, level.sparsity))
    if level.rebn:
        expected = recalibrate(graph, expected, x)
    compressed = materialize(graph, params, level, (x, labels))
    assert not any(node.op == "batch_norm" for node in compressed.graph.nodes)
    difference = (forward(compressed.graph, compressed.params, x) - forward(graph, expected, x)).abs().max()
    assert difference < 1e-4


def test_rounding_acts_on_folded_weights() -> None:
    graph, params = compressible.network("batch norm", dtype=torch.float32)
    folded_graph, folded = fold_batch_norm(graph, params)
    for text in FORMATS:
        level = parse_level(text)
        if level.bits is None or level.integer_inference or level.codebook:
            continue
        compressed = materialize(graph, params, level)
        assert compressed.graph == folded_graph
        for node in folded_graph.weighted():
            key = f"{node.name}.weight"
            stored = compressed.stored[key]
            assert stored.scale is not None
            rows = stored.scale.view(-1, *[1] * (folded[key].dim() - 1))
            assert bool(((compressed.params[key] - folded[key]).abs() <= rows * 0.5 * (1 + 1e-5)).all())
            assert (stored.bits, stored.zero_point is not None) == (level.bits, level.affine)
            assert len(stored.scale) == (1 if level.per_tensor else len(folded[key]))
            if not level.affine:
                wanted = step(folded[key].double(), level.bits, per_tensor=level.per_tensor).float()
                assert torch.equal(stored.scale, wanted)
        biases = {k: v for k, v in folded.items() if k.endswith(".bias")}
        assert all(torch.equal(compressed.params[k], v) for k, v in biases.items())


@pytest.mark.parametrize(
    "text",
    [*(f for f in FORMATS if f != INTEGER_INFERENCE), "prune:gu-l1:0.7+int4:tensor:affine", "prune:ls-l2:0.5+int3"],
)
@pytest.mark.parametrize("kind", ["cnn", "residual"])
def test_materialising_twice_changes_nothing(kind: str, text: str) -> None:
    graph, params = compressible.network(kind, dtype=torch.float32)
    once = materialize(graph, params, parse_level(text))
    twice = materialize(once.graph, once.params, parse_level(text.rpartition("+")[2]))
    assert twice.graph == once.graph
    for name, tensor in once.params.items():
        torch.testing.assert_close(twice.params[name], tensor, rtol=3e-7, atol=0)
        assert torch.equal(twice.params[name] == 0, tensor == 0)


@pytest.mark.parametrize(("text", "relative"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_half_precision(text: str, relative: float) -> None:
    graph, params = compressible.network("cnn", dtype=torch.float32)
    compressed = materialize(graph, params, parse_level(text))
    for name, tensor in compressed.params.items():
        assert tensor.dtype == torch.float32
        assert bool(((tensor - params[name]).abs() <= params[name].abs() * relative + 1e-7).all())
        assert compressed.stored[name].values.element_size() == 2


def test_overflow_and_non_finite_weights_are_named() -> None:
    graph, params = compressible.network("mlp", dtype=torch.float32)
    params["1.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"level fp16.*'1.weight' reaches 1e\+06.*65504"):
        materialize(graph, params, parse_level("fp16"))
    assert materialize(graph, params, parse_level("bf16")).params["1.weight"][0, 0] == pytest.approx(1e6, rel=2**-8)
    params["1.weight"][0, 0] = math.nan
    with pytest.raises(UserError, match=r"'1.weight' holds NaN"):
        materialize(graph, params, parse_level("dense"))


def test_pruned_zeros_have_no_sign() -> None:
    graph, params = compressible.network("mlp", dtype=torch.float32)
    for text in ("prune:gu-l1:0.5", "prune:gu-l1:0.5+fp16", "prune:gu-l1:0.5+int4", "prune:gu-l1:0.5+int4:affine"):
        weight = materialize(graph, params, parse_level(text)).params["1.weight"]
        assert int((weight == 0).sum()) > 0
        assert not torch.signbit(weight[weight == 0]).any()


def test_same_input_same_bits_and_input_untouched() -> None:
    graph, params = compressible.network("residual", dtype=torch.float32)
    before = {k: v.clone() for k, v in params.items()}
    data = (compressible.images(30, dtype=torch.float32), torch.arange(30) % 3)
    level = parse_level("prune:gs-grad:0.5+rebn+int4")
    first, second = materialize(graph, params, level, data), materialize(graph, params, level, data)
    assert first.graph == second.graph
    assert all(torch.equal(first.params[k], second.params[k]) for k in first.params)
    assert all(torch.equal(before[k], params[k]) for k in before)


@pytest.mark.parametrize("text", ["rebn", "prune:gu-grad:0.5"])
def test_missing_calibration_images(text: str) -> None:
    graph, params = compressible.network("mlp")
    with pytest.raises(ValueError, match="needs calibration images"):
        materialize(graph, params, parse_level(text))


def test_recalibrated_statistics_are_those_of_the_images() -> None:
    graph, params = compressible.network("batch norm")
    x = compressible.images(40)
    found = recalibrate(graph, params, x)
    seen: dict[str, torch.Tensor] = {}
    forward(graph, found, x, visit=lambda node, y: seen.__setitem__(node.name, y))
    norms = [n for n in graph.nodes if n.op == "batch_norm"]
    assert len(norms) == 4
    for node in norms:
        before = seen[node.inputs[0]]
        dims = [0, 2, 3] if before.dim() == 4 else [0]
        torch.testing.assert_close(found[f"{node.name}.running_mean"], before.mean(dims))
        torch.testing.assert_close(found[f"{node.name}.running_var"], before.var(dims, correction=0))
    unchanged = [k for k in params if "running" not in k]
    assert all(found[k] is params[k] for k in unchanged)


def test_gradients_over_many_images_are_those_of_the_mean_loss() -> None:
    graph, params = compressible.network("batch norm")
    x, labels = compressible.images(600), torch.arange(600) % 3
    leaves = {k: v.clone().requires_grad_(k.endswith("weight")) for k, v in params.items()}
    torch.nn.functional.cross_entropy(forward(graph, leaves, x), labels).backward()
    found = gradients(graph, params, x, labels)
    assert set(found) == {f"{n.name}.weight" for n in graph.weighted()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, leaves[name].grad)


def _single(weight: torch.Tensor) -> tuple[Graph, Params]:
    return Graph((Node("input", "input"), Node("fc", "linear", ("input",))), (weight.shape[1],)), {"fc.weight": weight}


def test_ideal_bits_by_hand() -> None:
    weight = torch.zeros(2, 16)
    weight[0, 0], weight[1, 0] = 1.0, 0.5
    graph, params = _single(weight)
    # two values, at distances 1 and 16 (5 bits each); the mask would cost 32 bits
    assert ideal_bits(materialize(graph, params, parse_level("dense"))) == 2 * (32 + 5)
    assert ideal_bits(materialize(graph, params, parse_level("fp16"))) == 2 * (16 + 5)
    assert ideal_bits(materialize(graph, params, parse_level("int4"))) == 2 * (4 + 5) + 2 * 32
    assert ideal_bits(materialize(graph, params, parse_level("int4:tensor"))) == 2 * (4 + 5) + 32
    assert ideal_bits(materialize(graph, params, parse_level("int4:affine"))) == 2 * (4 + 5) + 2 * (32 + 4)
    full = _single(torch.ones(2, 16))
    assert ideal_bits(materialize(*full, parse_level("int4"))) == 32 * 4 + 2 * 32
    half = _single(torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 8))
    assert ideal_bits(materialize(*half, parse_level("dense"))) == min(16 * (32 + 2), 16 * 32 + 32)


def test_macs_by_hand() -> None:
    graph, params = compressible.network("depthwise")
    maps = 36
    expected = maps * (2 * 5 * 9 + 5 * 9 + 5 * 4) + 144 * 3
    assert macs(graph, params) == expected
    smaller = materialize(graph, params, parse_level("prune:ls-l2:0.6"))
    assert macs(smaller.graph, smaller.params) == maps * (2 * 2 * 9 + 2 * 9 + 2 * 2) + 72 * 3
