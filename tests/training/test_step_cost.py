"""What a step costs: ideal pass counts, and measurements that can be trusted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cactus_ray.bounds.graph import forward
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import DataSet
from cactus_ray.models import create
from cactus_ray.training.bench import Costs, Spread, StepCost, _Alive, _Bench, _period, _timed, measure
from cactus_ray.training.passes import FULL, RAMP, WARM_UP, Phase, estimated_units, ideal_units, phases

FINAL = Phase()


def config(model: str | dict[str, Any] = "mlp", **values: Any) -> RunConfig:
    chosen = {"name": model, "width": 0.25} if isinstance(model, str) else model
    plain = {
        "data": {"name": "digits"}, "model": chosen, "threat": {"epsilon": 0.1},
        "train": {"batch_size": 16}, **values,
    }  # fmt: skip
    return parse(RunConfig, plain)


def units(phase: Phase = FINAL, **values: Any) -> float | None:
    found = config(**values)
    network = create(found, (1, 28, 28), 10)
    return ideal_units(found, network.graph, network.params, phase)


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
        (cactus(1, "single", awp_radius=0.5, awp_member="pruned", awp_kind="noise"), 20),
        (cactus(1, "none", awp_radius=0.5, awp_kind="rounding"), 20),
        ({"method": "ibp", "standard_weight": 1.0}, 3),  # the certified loss never has a weight
    ],
)
def test_ideal_units_count_the_passes(values: dict[str, Any], expected: float | None) -> None:
    assert units(**values) == expected


@pytest.mark.parametrize(
    ("values", "phase", "expected"),
    [
        ({"method": "sabr"}, Phase(part=WARM_UP), 3),  # epsilon 0: the standard loss alone
        ({"method": "sabr"}, Phase(part=RAMP), 11),
        ({"method": "ibp", "train": {"regularizer": 0.5}}, Phase(part=WARM_UP), 9),
        ({"method": "ibp", "train": {"regularizer": 0.5}}, Phase(part=RAMP), 9),  # it shares the loss's own box
        ({"method": "ibp", "standard_weight": 0.0}, Phase(part=RAMP), 9),
        ({"method": "taps"}, Phase(part=RAMP), 9),
        ({"method": "staps"}, Phase(part=RAMP), 11),
        ({"method": "crown_ibp"}, Phase(part=RAMP), 12),
        ({"method": "awp"}, Phase(part=WARM_UP), 3),
        (cactus(1, "single", awp_radius=0.5), Phase(part=WARM_UP), 6),
        ({"method": "c_sam"}, Phase("pretrain"), 11),
        ({"method": "c_sam"}, Phase("mask", 1), 26),
        ({"method": "c_sam"}, Phase("finetune", 2), 11),
        ({"method": "hydra"}, Phase("mask", 1), 11),
        ({"method": "qa_ibp"}, Phase("quantised", 1), 11),
        ({"method": "atmc"}, Phase("sparse", 1), 11),
    ],
)
def test_phases_pass_differently(values: dict[str, Any], phase: Phase, expected: float) -> None:
    assert units(phase, **values) == expected


def test_the_products_of_atmc_count_once_per_batch() -> None:
    found = config(method="atmc", model={"name": "mlp", "hidden": [64]}, train={"batch_size": 32})
    network = create(found, (1, 28, 28), 10)
    products, macs = 64 * 784 * 64 + 10 * 64 * 10, 64 * 784 + 10 * 64
    for stage in ("factorised", "quantised"):
        expected = 11 + 3 * products / (32 * macs)
        assert ideal_units(found, network.graph, network.params, Phase(stage)) == pytest.approx(expected)


def test_the_latent_attack_of_taps_is_a_guess() -> None:
    for method, expected in (("taps", 9 + 2 * 4), ("staps", 11 + 2 * 4)):
        found = config(method=method, latent_steps=4)
        network = create(found, (1, 28, 28), 10)
        assert estimated_units(found, network.graph, network.params) == expected


def test_phases_share_the_epochs_as_training_does() -> None:
    plain = config(method="sabr", train={"epochs": 10, "warmup": 0.05, "ramp": 0.25})
    assert [(p.part, p.first, p.end) for p in phases(plain)] == [
        (WARM_UP, 0, pytest.approx(0.5)), (RAMP, pytest.approx(0.5), pytest.approx(3)), (FULL, pytest.approx(3), 10),
    ]  # fmt: skip
    staged = config(method="c_sam", stage_shares=[2, 5, 3], train={"epochs": 20, "warmup": 0.0, "ramp": 1.0})
    assert [(p.stage, p.part, p.first, p.end) for p in phases(staged)] == [
        ("pretrain", RAMP, 0, 4), ("pretrain", FULL, 4, 4), ("mask", FULL, 4, 14), ("finetune", FULL, 14, 20),
    ]  # fmt: skip


IMAGES = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
SPLITS = ("train", "selection")
RANDOM = DataSet(
    "random", tuple("0123456789"), dict.fromkeys(SPLITS, IMAGES), dict.fromkeys(SPLITS, torch.arange(16) % 10), {}
)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "sabr"}, {"method": "ibp", "standard_weight": 0.0}, {"method": "pgd"}, {"method": "cc_ibp"},
        {"method": "crown_ibp"}, {"method": "taps"}, {"method": "staps"}, {"method": "hydra"}, {"method": "nrsloss"},
        {"method": "nrsloss", "certified_loss": "pgd"}, {"method": "qa_ibp"}, {"method": "awp"}, {"method": "atmc"},
        {"method": "c_sam"}, {"method": "c_sam", "certified_loss": "ibp"}, {"method": "ibp", "model": "norm"},
        {"method": "ibp", "train": {"regularizer": 0.5}}, cactus(1, "triple", set={"member_fraction": 0.5}),
        cactus(1, "single", awp_radius=0.5), cactus(1, "none", awp_radius=0.5, awp_steps=2),
        cactus(1, "single", awp_radius=0.5, awp_member="pruned", awp_steps=2),
        cactus(1, "single", awp_radius=0.5, awp_member="pruned", awp_kind="noise"),
    ],
    ids=str,
)  # fmt: skip
def test_counted_passes_are_those_that_a_step_makes(values: dict[str, Any]) -> None:
    """In floating-point operations; what is counted and not made is a gradient of the images, in every backward."""
    models = {"norm": {"name": "cnn5", "width": 0.25, "batch_norm": True}}
    model = models.get(values.get("model", ""), {"name": "cnn5", "width": 0.25})
    train = {"batch_size": 16, "epochs": 8, "warmup": 0.1, "ramp": 0.2, **values.get("train", {})}
    found = config(**{**values, "model": model, "train": train})
    for phase in phases(found):
        bench = _Bench.of("step", found, RANDOM, "cpu", phase, False)
        bench.step()  # from now on masks are kept, and the optimiser has its state
        graph, params = bench.run.graph, {name: tensor.detach() for name, tensor in bench.run.params.items()}
        plain, made = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with plain:
            forward(graph, params, IMAGES)
        with made:
            bench.step()
        counted = ideal_units(found, graph, params, phase)
        if counted is not None:
            passes = made.get_total_flops() / plain.get_total_flops()
            assert 0.9 * counted < passes <= counted * 1.001, phase


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


def test_a_whole_training_is_measured_phase_by_phase() -> None:
    cases = [
        ("staps", config(method="staps", train={"batch_size": 16, "epochs": 10, "warmup": 0.1, "ramp": 0.3})),
        ("c_sam", config(method="c_sam", train={"batch_size": 16, "epochs": 10, "warmup": 0.0, "ramp": 1.0},
                         stage_shares=[2, 5, 3])),
    ]  # fmt: skip
    found = measure(cases, RANDOM, repeats=1, steps=1, whole=True)
    assert [(step.case, step.name, pytest.approx(step.share)) for step in found.steps] == [
        ("staps", "staps warm-up", 0.1), ("staps", "staps ramp", 0.3), ("staps", "staps", 0.6),
        ("c_sam", "c_sam pretrain ramp", 0.2), ("c_sam", "c_sam mask", 0.5), ("c_sam", "c_sam finetune", 0.3),
    ]  # fmt: skip
    assert [step.ideal for step in found.steps] == [3, 11, None, 11, 26, 11]


def test_the_mean_step_of_a_training_weighs_its_phases() -> None:
    def step(case: str, share: float, *turns: float) -> StepCost:
        return StepCost(case, case, share, None, turns, Spread(1, 1, 1), None, None, 0)

    steps = (step("a", 0.25, 4.0, 8.0, 4.0), step("a", 0.75, 8.0, 4.0, 12.0), step("b", 1.0, 1.0, 1.0, 1.0))
    assert Costs(Spread(1, 1, 1), "contiguous", steps).of_training("a") == Spread(7.0, 5.0, 10.0)


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


def test_dear_steps_count_with_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 10.0 if calls[0] % 3 == 0 else 1.0

    monkeypatch.setattr("time.process_time", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert _timed(call, 4, "cpu") == 1.0
    calls[0] = 0
    assert _timed(call, 4, "cpu", period=3) == 4.0
    assert calls[0] == 6  # whole periods


def test_periods_are_those_of_masks_and_codebooks() -> None:
    quantised = Phase("quantised", 3)
    assert _period(config(method="atmc", train={"epochs": 4}), quantised) == 10
    assert _period(config(method="atmc", train={"epochs": 4}), Phase("sparse", 1)) == 1
    assert _period(config(**cactus(1, "single", set={"refresh_every": 7})), FINAL) == 7
    assert _period(config(**cactus(1, "single", set={"refresh_every": 500})), FINAL) == 1  # next to never
    assert _period(config(method="sabr"), FINAL) == 1
