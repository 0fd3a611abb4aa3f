"""bfloat16 in the attack's products and nowhere else."""

from typing import Any

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.bounds.interval import ball
from cactus_ray.config import TrainConfig
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.training import attacks
from cactus_ray.training.attacks import pgd
from cactus_ray.training.loop import train
from cactus_ray.training.precision import of_attack


def test_batch_norm_and_loss_of_the_attack_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (
        Node("input", "input"),
        Node("conv", "conv2d", ("input",), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
        Node("bn", "batch_norm", ("conv",), {"eps": 1e-5, "momentum": 0.1}),
        Node("relu", "relu", ("bn",)),
        Node("flatten", "flatten", ("relu",)),
        Node("fc", "linear", ("flatten",)),
    )
    generator = torch.Generator().manual_seed(0)
    params: Params = {
        "conv.weight": torch.randn(4, 1, 3, 3, generator=generator),
        "bn.running_mean": torch.zeros(4),
        "bn.running_var": torch.ones(4),
        "fc.weight": torch.randn(3, 64, generator=generator),
    }
    images, labels = torch.rand(8, 1, 4, 4, generator=generator), torch.arange(8) % 3
    seen: dict[str, torch.dtype] = {}
    losses: list[torch.dtype] = []
    whole, cross_entropy = attacks.forward, torch.nn.functional.cross_entropy

    def forward(*arguments: Any, **options: Any) -> torch.Tensor:
        return whole(*arguments, **options, visit=lambda node, y: seen.__setitem__(node.name, y.dtype))

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = cross_entropy(*arguments, **options)
        losses.append(loss.dtype)
        return loss

    monkeypatch.setattr(attacks, "forward", forward)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    region = ball(images, 0.1, (0.0, 1.0))
    points = {}
    for name in ("float32", "bf16"):
        with of_attack(TrainConfig(precision=name), torch.device("cpu")):
            points[name] = pgd(
                Graph(nodes, (1, 4, 4)), params, labels, region,
                steps=3, step_size=0.05, start=torch.full_like(images, 0.5),
            )  # fmt: skip
        assert (seen["bn"], losses[-1]) == (torch.float32, torch.float32)
        if name == "bf16":  # in float32 the two are one node
            assert seen["conv"] == torch.bfloat16
        assert points[name].dtype == torch.float32
        assert (points[name] >= region.lower).all()
        assert (points[name] <= region.upper).all()
    assert (points["bf16"] == points["float32"]).float().mean() > 0.8


def test_refused_on_a_cpu(run_config: Any, few_digits: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: got 'bf16'; expected float32 without a GPU"):
        train(run_config(train__precision="bf16"), few_digits, report=lambda _: True)
    assert run_config(train__precision="float32").config_hash == run_config().config_hash


def test_training_switches_tf32_off_and_gives_it_back(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default, whatever ran before
    seen = []

    def report(epoch: Any) -> bool:
        seen.append(torch.backends.cudnn.allow_tf32)
        return True

    train(run_config(train__epochs=1), few_digits, report=report)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 is True
