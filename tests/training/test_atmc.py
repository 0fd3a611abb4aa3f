"""ATMC: what its stages keep, what ADMM draws them to, and that levels find the factors again."""

from typing import Any

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node, forward
from cactus_ray.bounds.interval import ball, propagate
from cactus_ray.compression.factorize import PARTS, split
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import ThreatConfig
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.interchange.run import logits
from cactus_ray.interchange.write import FileInfo, onnx_bytes
from cactus_ray.models.network import Network, pack, unpack
from cactus_ray.training.loop import train
from cactus_ray.training.methods.atmc import STAGES, zero_kmeans
from cactus_ray.training.state import State, unpack_state
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.verdict import Verdict, VerificationSettings

WEIGHTS = ("fc1.weight", "fc2.weight")
TOTAL, KEPT = 24 * 64 + 10 * 24, 177


def trained(run_config: Any, data: DataSet, **changes: Any) -> tuple[Network, list[State]]:
    """The network, and the saved state at the end of every stage."""
    config = run_config(method="atmc", train__epochs=12, stage_shares=[6, 2, 2, 2], admm_every=3, **changes)
    states: list[State] = []
    network = train(config, data, report=lambda r: states.append(unpack_state(r.save())) is None).network
    return network, [states[i] for i in (5, 7, 9, 11)]


def test_stages_keep_no_more_than_they_should(run_config: Any, few_digits: DataSet) -> None:
    network, states = trained(run_config, few_digits)
    dense, sparse, *factored = states
    assert sum(int(dense.params[k].count_nonzero()) for k in WEIGHTS) == TOTAL
    assert sum(int(sparse.params[k].count_nonzero()) for k in WEIGHTS) == KEPT
    for state in factored:
        parts = [v for k, v in state.auxiliary.items() if k.endswith(PARTS)]
        assert len(parts) == 6
        assert sum(int(p.count_nonzero()) for p in parts) == KEPT
        assert not torch.equal(state.auxiliary["fc1.left"], torch.eye(24))
    made = factored[-1].auxiliary
    expected = made["fc1.left"] @ made["fc1.right"] + made["fc1.sparse"]
    assert torch.equal(network.params["fc1.weight"], expected)
    assert all(torch.equal(network.params[f"fc1.{part}"], made[f"fc1.{part}"]) for part in PARTS)


def test_factors_reproduce_the_weights_before_the_first_step(run_config: Any, few_digits: DataSet) -> None:
    config = {"learning_rate": 1e-12, "target_sparsity": 0.0, "train__weight_decay": 0.0}
    _, (dense, _, factored, _) = trained(run_config, few_digits, **config)
    made = factored.auxiliary
    whole = made["fc1.left"] @ made["fc1.right"] + made["fc1.sparse"]
    missing = (whole - dense.params["fc1.weight"]).abs() > 1e-6
    assert 0 < int(missing.sum()) <= 34  # as many as the identities have entries


def gap(state: State, bits: int) -> float:
    """Squared distance of all factors to few values, relative."""
    parts = [v for k, v in state.auxiliary.items() if k.endswith(PARTS)]
    return sum(float((p - zero_kmeans(p, p != 0, bits)).square().sum()) for p in parts) / sum(
        float(p.square().sum()) for p in parts
    )


def test_admm_draws_factors_to_few_values(run_config: Any, few_digits: DataSet) -> None:
    gaps = {}
    for weight in (0.0, 30.0):
        _, (_, _, _, last) = trained(run_config, few_digits, admm_weight=weight, codebook_bits=2)
        gaps[weight] = gap(last, 2)
    assert gaps[30.0] < 0.5 * gaps[0.0]


def test_zero_kmeans_follows_the_support() -> None:
    values, support = torch.tensor([[1.0, 1.1, -2.0, 0.3]]), torch.tensor([[True, True, True, False]])
    assert zero_kmeans(values, support, 2).tolist()[0] == pytest.approx([1.0, 1.1, -2.0, 0.0])
    found = zero_kmeans(torch.tensor([1.0, 1.1, 3.0, 3.1, -2.0, 0.01]), torch.ones(6, dtype=torch.bool), 2)
    assert found.tolist() == pytest.approx([1.05, 1.05, 3.05, 3.05, -2.0, 0.0])


def test_levels_find_the_factors_of_training(run_config: Any, few_digits: DataSet) -> None:
    network, _ = trained(run_config, few_digits)
    network = unpack(pack(network))
    own = split(WEIGHTS, network.params, 0.1)
    assert sum(f.nonzeros for f in own.values()) == KEPT
    assert all(torch.equal(own[k].left.float(), network.params[f"{k[:3]}.left"]) for k in WEIGHTS)
    fewer = split(WEIGHTS, network.params, 0.05)
    assert sum(f.nonzeros for f in fewer.values()) <= 0.05 * TOTAL
    changed = {**network.params, "fc1.weight": 1.5 * network.params["fc1.weight"]}
    assert not torch.equal(split(WEIGHTS, changed, 0.1)["fc1.weight"].left.float(), network.params["fc1.left"])
    for level in ("dense", "int8", "prune:gu-l1:0.5", "w8a8"):  # which have no use for them
        found = materialize(network.graph, network.params, parse_level(level), few_digits.split("train"))
        assert set(found.stored) == {*WEIGHTS, "fc1.bias", "fc2.bias"}


def test_from_training_to_certified_files(run_config: Any, few_digits: DataSet) -> None:
    network, _ = trained(run_config, few_digits, target_sparsity=0.7, learning_rate=0.01)
    images, labels = (t[:40] for t in few_digits.split("selection"))
    sizes, certified = [], []
    for level in ("dense", "lr+sparse:0.3", "lr+sparse:0.3+codebook:4"):
        compressed = materialize(network.graph, network.params, parse_level(level))
        data = onnx_bytes(compressed, FileInfo("digits", few_digits.class_names, (0.0, 1.0)))
        graph, params, _ = read_onnx(data)
        assert all(torch.equal(params[k], v) for k, v in compressed.params.items())
        assert (logits(data, images) - forward(graph, params, images)).abs().max() < 1e-4
        settings = VerificationSettings(attack_steps=5, restarts=1)
        found = verify(graph, params, images, labels, list(range(40)), ThreatConfig(epsilon=0.03), settings)
        sizes.append(len(data))
        certified.append(sum(v.verdict == Verdict.CERTIFIED for v in found))
    assert sizes[2] < sizes[1] < 4000  # about 500 entries of 16 bits and their places
    assert certified[0] > 10
    assert certified[1] >= certified[0] - 2  # 12 bits lose next to nothing


def test_bounds_are_on_the_weight_and_tighter_than_on_its_factors(run_config: Any) -> None:
    config, generator = run_config(method="atmc"), torch.Generator().manual_seed(0)
    graph = Graph((Node("input", "input"), Node("fc", "linear", ("input",))), (9,))
    shapes = {"fc.left": (7, 3), "fc.right": (3, 9), "fc.sparse": (7, 9)}
    parts = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    params = STAGES[2].network(config, graph, {"fc.weight": torch.zeros(7, 9, dtype=torch.float64)}, parts)
    box = ball(torch.rand(5, 9, generator=generator, dtype=torch.float64), 0.05, (-1.0, 2.0))
    magnitudes = parts["fc.left"].abs() @ parts["fc.right"].abs() + parts["fc.sparse"].abs()
    assert float(propagate(graph, params, box).radius.sum()) < 0.8 * float((box.radius @ magnitudes.T).sum())


def test_options_are_checked(run_config: Any) -> None:
    wrong = [("codebook_bits", 1), ("codebook_bits", 7), ("admm_weight", -1.0), ("admm_every", 0)]
    for key, value in [*wrong, ("target_sparsity", 1.0)]:
        with pytest.raises(ConfigError, match=key):
            run_config(method="atmc", **{key: value})
