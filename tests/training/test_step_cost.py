"""What a step costs: ideal pass counts, and measurements that can be trusted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cactus_ray.config import RunConfig, parse
from cactus_ray.data import DataSet
from cactus_ray.models import create
from cactus_ray.training.bench import _Alive, ideal_units, measure


def config(model: str = "mlp", **values: Any) -> RunConfig:
    plain = {
        "data": {"name": "digits"}, "model": {"name": model, "width": 0.25}, "threat": {"epsilon": 0.1},
        "train": {"batch_size": 16}, **values,
    }  # fmt: skip
    return parse(RunConfig, plain)


def units(**values: Any) -> float | None:
    found = config(**values)
    return ideal_units(found, create(found, (1, 28, 28), 10).graph)


def cactus(k: int, strategy: str, **values: Any) -> dict[str, Any]:
    chosen = {"strategy": strategy, **values.pop("set", {})}
    return {
        "method": "cactus", "certified_loss": "sabr", "attack_steps": k, "compression_set": chosen, **values,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "ibp"}, 9),
        ({"method": "ibp", "standard_weight": 0.0}, 6),  # nobody needs the clean pass
        ({"method": "ibp", "standard_weight": 0.0, "model": "cnn7"}, 9),  # but batch norm does
        ({"method": "sabr", "attack_steps": 1}, 11),
        ({"method": "sabr", "attack_steps": 8}, 25),
        ({"method": "standard"}, 3),
        ({"method": "pgd", "attack_steps": 10}, 26),
        ({"method": "mtl_ibp"}, 14),
        ({"method": "cc_ibp", "standard_weight": 0.0}, 11),
        ({"method": "exp_ibp", "standard_weight": 0.0, "model": "cnn7"}, 12),  # a clean forward, no backward
        ({"method": "crown_ibp"}, 9),
        ({"method": "crown_ibp", "crown_weight": 1.0}, 12),
        ({"method": "taps"}, None),
        ({"method": "hydra", "attack_steps": 8}, 25),
        ({"method": "qa_ibp", "certified_loss": "ibp"}, 9),
        ({"method": "nrsloss", "attack_steps": 8}, 25),
        ({"method": "nrsloss", "certified_loss": "pgd", "attack_steps": 1}, 14),
        ({"method": "awp", "attack_steps": 8}, 34),
        ({"method": "awp", "attack_steps": 8, "awp_gamma": 0.0}, 25),
        (cactus(8, "none"), 25),
        (cactus(8, "single"), 34),
        (cactus(1, "single"), 20),
        (cactus(1, "single", set={"member_fraction": 0.5}), 15.5),
        (cactus(1, "single", set={"member_fraction": 0.25}), 13.25),
        (cactus(1, "triple"), 38),
        (cactus(1, "random", set={"size": 5}), 47),
        (cactus(1, "adaptive"), 38),
        (cactus(1, "none", awp_radius=0.5), 20),
        (cactus(1, "none", awp_radius=0.5, awp_steps=2), 38),
        (cactus(1, "single", awp_radius=0.5), 29),
        (cactus(1, "single", awp_radius=0.5, awp_member="pruned"), 29),
    ],
)
def test_ideal_units_count_the_passes(values: dict[str, Any], expected: float | None) -> None:
    assert units(**values) == expected


def test_measure_times_every_case_beside_the_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 1, 8, 8, generator=generator), torch.arange(16) % 10
    splits = ("train", "selection")
    data = DataSet("random", tuple("0123456789"), dict.fromkeys(splits, images), dict.fromkeys(splits, labels), {})
    cases = [("sabr", config(method="sabr", attack_steps=8)), ("ibp", config(method="ibp"))]
    cases += [("staps", config(method="staps")), ("qa_ibp", config(method="qa_ibp"))]
    found = measure(cases, data, repeats=2, steps=1)
    names = ["sabr", "ibp", "staps", "qa_ibp pretrain", "qa_ibp quantised"]
    assert [step.name for step in found.steps] == names
    assert found.forward_seconds.low > 0
    assert found.steps[2].ideal is None
    for step in found.steps[:2]:
        assert step.ideal is not None
        assert step.efficiency == pytest.approx(step.ideal / step.forwards.median)
        assert step.forwards.low <= step.forwards.median <= step.forwards.high
        # weights, their gradients and Adam's two moments at least
        assert step.peak_bytes > 4 * 4 * 64 * 32


def test_peak_counts_what_is_alive_and_not_what_is_gone() -> None:
    alive = _Alive()
    with alive:
        kept = torch.zeros(1000)
        for _ in range(5):
            passing = torch.ones(1000) + 1.0
            del passing
        both = kept + 1.0
    assert alive.bytes == 8000
    assert 8000 < alive.peak <= 16000  # never all the ten thousands that came and went
    del kept, both
    assert alive.bytes == 0
