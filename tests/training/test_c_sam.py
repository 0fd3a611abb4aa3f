"""C-SAM: its soft masks, its losses by hand, and a finished network through levels, verification and its file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import make_step
from test_stages import states_of
from torch import Tensor

from cactus_ray import cli
from cactus_ray.bounds.graph import Params, forward
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.prune import apply_masks
from cactus_ray.config import DataConfig, RunConfig
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level
from cactus_ray.training.loop import train
from cactus_ray.training.methods.c_sam import STAGES, binarised, c_sam, first_mask, mask_loss
from cactus_ray.training.stages import begin
from cactus_ray.training.step import Step

SMOKE = str(Path(__file__).parents[2] / "search_spaces" / "smoke.yaml")


def searching(config: RunConfig, data: DataSet, **changes: Any) -> tuple[Step, Params, Params]:
    """A step of the search, the frozen tensors, and the soft masks by name of the weight."""
    first = make_step(config, data)
    params, auxiliary = begin(STAGES[1], config, first.graph, first.params, {})
    network = STAGES[1].network(config, first.graph, params, auxiliary)
    step = replace(first, params=network, auxiliary=auxiliary, stage="mask", **changes)
    return step, params, {k.replace(".mask", ".weight"): v for k, v in auxiliary.items() if k.endswith(".mask")}


def test_masks_start_in_units_of_a_percentile() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.5], [-0.6, 0.7, -0.8, 0.9, -4.0]])
    expected = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 7, 7, 7]]) / 7
    torch.testing.assert_close(first_mask(weight, 0.3), expected)
    assert torch.equal(first_mask(weight, 1.0), torch.ones(2, 5))
    assert torch.equal(first_mask(torch.zeros(3, 3), 0.3), torch.zeros(3, 3))
    large = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert float((first_mask(large, 0.3) == 1).float().mean()) == pytest.approx(0.3, abs=0.001)


def test_binarised_masks_rank_by_mask_and_then_by_magnitude(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="c_sam", train__epochs=3, target_sparsity=0.9)
    step, params, soft = searching(config, few_digits)
    found = binarised(config, step.graph, params, soft)
    flat, ranked = (torch.cat([each[k].flatten() for k in found]) for each in (found, soft))
    assert int((flat == 0).sum()) == round(0.9 * flat.numel())
    assert float(ranked.detach()[flat == 1].min()) == 1.0  # 30 % started there, so that magnitudes decide
    for name, mask in found.items():
        weight, saturated = params[name].detach().abs(), soft[name].detach() == 1
        if bool((mask[saturated] == 0).any()) and bool((mask == 1).any()):
            assert float(weight[mask == 1].min()) >= float(weight[saturated & (mask == 0)].max())
    lowered = dict(soft) | {"fc1.weight": torch.zeros_like(soft["fc1.weight"])}
    assert int(binarised(config, step.graph, params, lowered)["fc1.weight"].sum()) == 0


def test_still_predictions_cost_nothing(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="c_sam", train__epochs=3, target_sparsity=0.0, mask_saturated=1.0)
    step, params, soft = searching(config, few_digits)
    loss = mask_loss(step, params, soft, (params, params), step.images)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 1.0, rel=1e-5)  # softplus(-1), and masks of 1


def test_the_losses_by_their_definitions(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="c_sam", train__epochs=3, target_sparsity=0.5)
    step, params, soft = searching(config, few_digits)
    generator = torch.Generator().manual_seed(5)
    noisy = tuple(
        apply_masks(params, {k: torch.rand(v.shape, generator=generator) for k, v in soft.items()}) for _ in range(2)
    )
    changed = (step.images + 0.1).clamp(max=1.0)

    def probabilities(tensors: Params, images: Tensor) -> Tensor:
        return forward(step.graph, tensors, images).detach().double().softmax(1)

    first, second = (probabilities(n, step.images) for n in noisy)
    mean = (first + second) / 2
    stability = sum(((p - mean) ** 2).sum(1).mean() for p in (first, second)) / 2
    top = first.sort(1).values
    gap = ((top[:, -1] - top[:, -2]) / 2).clamp(min=0.05)
    r = (first - probabilities(noisy[1], changed)).abs().max(1).values / gap
    of_soft, of_binary = (probabilities(t, step.images) for t in (apply_masks(params, soft), step.params))
    divergence = (of_soft * (of_soft / of_binary).log()).sum(1).mean()
    length = torch.cat([v.flatten() for v in soft.values()]).mean()
    expected = 5 * stability + torch.log1p((r - 1).exp()).mean() + divergence + length
    assert mask_loss(step, params, soft, noisy, changed).item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_mask_has_a_gradient_under_noise_and_none_reaches_the_weights(
    run_config: Any, few_digits: DataSet
) -> None:
    step, params, soft = searching(run_config(method="c_sam", train__epochs=3), few_digits)
    (loss,) = c_sam(step)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(v.grad is not None and float((v.grad != 0).float().mean()) > 0.5 for v in soft.values())
    assert all(v.grad is None for v in params.values())
    other, _, _ = searching(step.config, few_digits, generator=torch.Generator().manual_seed(9))
    assert next(iter(c_sam(other))).item() != pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["ibp", "sabr", "mtl_ibp"])
def test_the_search_freezes_the_network_and_its_masks_stay_masks(
    loss: str, run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(
        method="c_sam", certified_loss=loss, train__epochs=6, stage_shares=[2, 2, 2], target_sparsity=0.8
    )
    states = states_of(config, few_digits)
    before, searched, after = states[1], states[3], states[5]
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(before.params[name], searched.params[name])
    started = {f"{n}.mask": first_mask(before.params[f"{n}.weight"], 0.3) for n in ("fc1", "fc2")}
    for name, mask in started.items():
        found = searched.auxiliary[name]
        assert not torch.equal(found, mask)
        assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0
    flat = torch.cat([after.auxiliary[name].flatten() for name in started])
    assert set(flat.unique().tolist()) == {0.0, 1.0}
    assert int((flat == 0).sum()) == round(0.8 * flat.numel())
    assert set(after.auxiliary) == set(started)
    assert not torch.equal(after.params["fc1.weight"], searched.params["fc1.weight"])


@pytest.mark.parametrize("sparsity", [0.0, 0.83, 0.97])
def test_pruning_the_finished_network_to_its_sparsity_changes_nothing(
    sparsity: float, run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(method="c_sam", train__epochs=3, target_sparsity=sparsity)
    network = train(config, few_digits, report=lambda _: True).network
    level = parse_level(f"prune:gu-l1:{sparsity}")
    plain, pruned = (materialize(network.graph, network.params, at, None) for at in (parse_level("dense"), level))
    assert all(torch.equal(plain.params[k], v) for k, v in pruned.params.items())


@pytest.mark.parametrize(("key", "value"), [("mask_noise", 1.5), ("mask_saturated", 0.0), ("target_sparsity", 1.0)])
def test_options_out_of_range_are_refused(key: str, value: float, run_config: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got {value}; expected a finite number in"):
        run_config(method="c_sam", train__epochs=3, **{key: value})


def test_from_training_to_verdicts_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.safetensors"
    fixed = ["method=c_sam", "learning_rate=0.005", "target_sparsity=0.8", "train.epochs=6", "threat.epsilon=0.02",
             "model.name=mlp", "model.hidden=[64]"]  # fmt: skip
    options = [word for pair in fixed for word in ("--set", pair)]
    assert cli.run(["train", SMOKE, *options, "--out", str(path)]) == 0
    capsys.readouterr()
    arguments = ["verify", str(path), "--samples", "60", "--bound", "ibp", "--json"]
    assert cli.run([*arguments, "--levels", "dense,int8,prune:gu-l1:0.8+int4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["standard_accuracy"] > 0.6 and row["n_certified"] > 20 for row in rows)
    file = at_level(load_network(path), "dense", DataConfig(name="digits"), (0.0, 1.0)).file
    graph, params, _ = read_onnx(file)
    weights = torch.cat([params[f"{n.name}.weight"].flatten() for n in graph.weighted()])
    assert int((weights == 0).sum()) >= round(0.8 * weights.numel())
    dense = load_network(path)
    whole = {k: torch.rand(v.shape) if k.endswith("weight") else v for k, v in dense.params.items()}
    bytes_of_dense = len(at_level(replace(dense, params=whole), "dense", DataConfig(name="digits"), (0.0, 1.0)).file)
    assert len(file) < 0.5 * bytes_of_dense  # zeros are not stored
