"""What is particular to the baselines among the methods."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_methods import BATCH_NORM, make_step, take

from cactus_ray.bounds.graph import Graph, Node
from cactus_ray.bounds.interval import Box
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import CERTIFIED_LOSSES
from cactus_ray.data import DataSet
from cactus_ray.options import METHOD_OPTIONS
from cactus_ray.training import perturb
from cactus_ray.training.compiled import AS_WRITTEN
from cactus_ray.training.loop import train
from cactus_ray.training.methods import STAGES
from cactus_ray.training.methods.awp import ascent
from cactus_ray.training.methods.nrsloss import Instability
from cactus_ray.training.step import full_loss

BASELINES = tuple(method for method in METHOD_OPTIONS if method != "cactus")


@pytest.mark.parametrize("loss", CERTIFIED_LOSSES)
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_take_every_loss(method: str, loss: str, run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method=method, certified_loss=loss, model=BATCH_NORM, train__regularizer=0.5)
    for epsilon in (0.02, 0.05):  # during the ramp and after it
        losses, gradients = take(make_step(config, few_digits, epsilon=epsilon))
        assert len(losses) == 1
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize(("method", "option"), [("nrsloss", "nrs_weight"), ("awp", "awp_gamma")])
def test_without_its_own_term_a_baseline_is_plain_training(
    method: str, option: str, run_config: Any, few_digits: DataSet
) -> None:
    plain, gradients = take(make_step(run_config(method="sabr"), few_digits))
    off, same = take(make_step(run_config(method=method, **{option: 0.0}), few_digits))
    on, other = take(make_step(run_config(method=method, **{option: 0.1}), few_digits))
    assert plain == pytest.approx(off)
    assert plain != pytest.approx(on, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient)
    assert not torch.allclose(other["fc1.weight"], gradients["fc1.weight"])


def test_instability_of_a_tiny_network() -> None:
    bn = {"bn.weight": torch.tensor([2.0, 0.0]), "bn.bias": torch.zeros(2)}
    nodes = (Node("input", "input"), Node("bn", "batch_norm", ("input",)), Node("relu", "relu", ("bn",)))
    nodes += (Node("relu2", "relu", ("relu",)),)
    graph = Graph(nodes, (2,))
    seen = Instability(graph, bn)
    seen(nodes[0], Box(torch.zeros(1, 2), torch.ones(1, 2)))
    assert float(seen.value()) == 0.0  # no ReLU yet
    seen(nodes[1], Box(torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 1.0]])))  # [-2, 4] and [2, 4]
    seen(nodes[2], Box(torch.tensor([[2.0, 3.0]]), torch.tensor([[2.0, 1.0]])))  # [0, 4] and [2, 4]
    seen(nodes[3], Box(torch.tensor([[2.0, 3.0]]), torch.tensor([[2.0, 1.0]])))
    terms = [math.tanh(1 - 8 / 4), 1.0, math.tanh(1.0), math.tanh(9.0)]  # gamma 2 and 0; then none
    assert float(seen.value()) == pytest.approx(-sum(terms) / 4)


def test_instability_falls_as_it_is_trained(run_config: Any, few_digits: DataSet) -> None:
    """The term alone, with the weight of everything else all but nothing beside it."""
    config = run_config(method="nrsloss", nrs_weight=100.0, model=BATCH_NORM)
    step = make_step(config, few_digits)
    optimizer = torch.optim.Adam([v for v in step.params.values() if v.requires_grad], lr=0.01)
    course = []
    for _ in range(20):
        optimizer.zero_grad()
        course.append(sum(take(replace(step, statistics={}))[0]))
        optimizer.step()
    assert course[-1] < course[0] - 5.0


def test_l2_perturbation_has_the_norm_of_its_tensor_and_raises_the_loss(run_config: Any, few_digits: DataSet) -> None:
    step = make_step(run_config(method="awp", model=BATCH_NORM), few_digits)
    loss, region = full_loss(step, "sabr")
    deltas = ascent(loss, step.params, 0.02)
    assert set(deltas) == {"fc1.weight", "fc2.weight"}  # more than one dimension
    for name, delta in deltas.items():
        assert float(delta.norm()) == pytest.approx(0.02 * float(step.params[name].detach().norm()), rel=1e-4)
    there = replace(step, params=perturb.apply(step.params, deltas), statistics={})
    assert full_loss(there, "sabr", region=region)[0] > loss


def test_l2_perturbation_attacks_once_and_leaves_the_statistics_alone(run_config: Any, few_digits: DataSet) -> None:
    calls: list[int] = []
    counted = replace(AS_WRITTEN, attack=lambda *a, **o: (calls.append(1), AS_WRITTEN.attack(*a, **o))[1])
    alone = make_step(run_config(method="sabr", model=BATCH_NORM), few_digits, passes=counted)
    perturbed = make_step(run_config(method="awp", model=BATCH_NORM, awp_gamma=0.1), few_digits, passes=counted)
    take(alone)
    take(perturbed)
    assert len(calls) == 2
    for name, pair in alone.statistics.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, perturbed.statistics[name], strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("model", [BATCH_NORM, {"name": "cnn_small", "width": 0.25}])
def test_the_level_of_its_width_changes_nothing_in_a_quantised_network(
    bits: int, model: dict[str, Any], run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(method="qa_ibp", model=model, weight_bits=bits)
    network = train(config, few_digits, report=lambda _: True).network
    dense = materialize(network.graph, network.params, parse_level("dense"))
    rounded = materialize(network.graph, network.params, parse_level("ternary" if bits == 2 else f"int{bits}"))
    for node in network.graph.weighted():
        weight = network.params[f"{node.name}.weight"]
        for row in weight.flatten(1):
            assert len(row.unique()) <= 2**bits - 1
    for name, tensor in dense.params.items():
        torch.testing.assert_close(rounded.params[name], tensor, rtol=1e-6, atol=0.0)


def test_gradients_go_straight_through_the_rounding(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="qa_ibp", weight_bits=2)
    step = make_step(config, few_digits)
    network = STAGES["qa_ibp"][1].network(config, step.graph, step.params, {})
    assert torch.equal(network["fc1.bias"], step.params["fc1.bias"])
    _, gradients = take(replace(step, params=network))
    assert set(gradients) == {"fc1.bias", "fc2.bias"}  # leaves of the network itself
    fixed = {k: v.detach().requires_grad_() for k, v in network.items()}
    _, at_rounded = take(replace(step, params=fixed))
    for name, gradient in at_rounded.items():
        torch.testing.assert_close(step.params[name].grad, gradient)


def test_radii_draw_weights_that_are_rounded_to_zero(run_config: Any, few_digits: DataSet) -> None:
    step = make_step(run_config(method="qa_ibp", weight_bits=2), few_digits)
    weight = step.params["fc1.weight"]
    stage = STAGES["qa_ibp"][1]
    rounded = stage.network(step.config, step.graph, step.params, {})["fc1.weight"]
    with torch.no_grad():
        deployed = stage.network(step.config, step.graph, step.params, {})["fc1.weight"]
    assert 0 < int((deployed == 0.0).sum()) < deployed.numel()
    torch.testing.assert_close(rounded, deployed, rtol=0.0, atol=1e-19)
    (pull,) = torch.autograd.grad(rounded.abs().sum(), weight)  # as in the radius of an interval bound
    assert torch.equal(pull, weight.sign())
