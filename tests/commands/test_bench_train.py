"""``cactus-ray bench train``."""

from __future__ import annotations

import json

import pytest

from cactus_ray import config
from cactus_ray.cli import run
from cactus_ray.commands.bench import STRATEGIES, BenchOptions, _cases


def test_prints_every_method_with_its_efficiency(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "train", "--model", "mlp", "--image", "1x8x8", "--batch-size", "8", "--repeats", "1"]
    assert run([*arguments, "--methods", "ibp,sabr", "--attack-steps", "1,2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(step["name"], step["attack_steps"]) for step in printed["steps"]] == [
        ("ibp", None), ("sabr", 1), ("sabr", 2),
    ]  # fmt: skip
    assert [step["ideal"] for step in printed["steps"]] == [9.0, 11.0, 13.0]
    assert all(len(step["turns"]) == 1 and step["seconds"]["median"] == step["turns"][0] for step in printed["steps"])
    assert run([*arguments, "--methods", "cactus", "--attack-steps", "1"]) == 0
    printed_table = capsys.readouterr().out
    assert all(f"cactus {name} " in printed_table for name in STRATEGIES)


def test_steps_are_compared_with_those_of_sabr_turn_by_turn(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "train", "--model", "mlp", "--image", "1x8x8", "--batch-size", "8", "--repeats", "3"]
    assert run([*arguments, "--methods", "ibp,mtl_ibp,sabr", "--attack-steps", "1,2", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    turns = {(step["name"], step["attack_steps"]): step["turns"] for step in steps}
    ratios = {(step["name"], step["attack_steps"]): step["over_sabr"] for step in steps}
    assert ratios["ibp", None] is ratios["sabr", 1] is ratios["sabr", 2] is None
    for k in (1, 2):
        expected = sorted(a / b for a, b in zip(turns["mtl_ibp", k], turns["sabr", k], strict=True))
        assert list(ratios["mtl_ibp", k].values()) == [expected[1], expected[0], expected[2]]


def test_strategies_are_named_and_batch_norm_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "train", "--image", "1x8x8", "--batch-size", "8", "--repeats", "1", "--methods", "cactus"]
    arguments += ["--attack-steps", "1"]
    chosen = ["--strategies", "adaptive,awp-3", "--model", "cnn_small", "--width", "0.25", "--json"]
    peaks = {}
    for norm in ("--batch-norm", "--no-batch-norm"):
        assert run([*arguments, *chosen, norm]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["settings"]["batch_norm"] is (norm == "--batch-norm")
        assert [step["name"] for step in printed["steps"]] == ["cactus adaptive", "cactus awp-3"]
        assert [step["ideal"] for step in printed["steps"]] == [38, 47]
        peaks[norm] = [step["peak_bytes"] for step in printed["steps"]]
    assert all(a > b for a, b in zip(peaks["--batch-norm"], peaks["--no-batch-norm"], strict=True))


def test_all_strategies_and_kinds_of_perturbation_can_be_timed() -> None:
    options = BenchOptions("mlp", 1.0, None, "1x8x8", 8, "cactus", None, "1", 1, 1, "cpu", False)
    assert [name for name, _ in _cases(options, (1, 8, 8))] == [f"cactus {name}" for name in STRATEGIES]
    sets = [values["compression_set"]["strategy"] for values in STRATEGIES.values()]
    kinds = [values.get("awp_kind", "ascent") for values in STRATEGIES.values() if "awp_radius" in values]
    assert set(sets) == set(config.STRATEGIES)
    assert set(kinds) == set(config.AWP_KINDS)


def test_strategies_without_cactus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", "--methods", "ibp", "--strategies", "awp"]) == 2
    assert "--strategies: got 'awp'; expected nothing without cactus" in " ".join(capsys.readouterr().err.split())


def test_attacked_tails_begin_where_the_network_can_be_cut() -> None:
    options = BenchOptions("resnet18", 0.02, None, "1x8x8", 8, "taps,staps", None, "1", 1, 1, "cpu", False)
    cases = _cases(options, (1, 8, 8))
    assert [config.tail_layers for _, config in cases] == [3, 3]  # a residual connection crosses 2
    smaller = BenchOptions("cnn_small", 1.0, None, "1x8x8", 8, "taps", None, "1", 1, 1, "cpu", False)
    assert [config.tail_layers for _, config in _cases(smaller, (1, 8, 8))] == [2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # hidden by dynamo
def test_compiled_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cactus_ray.training.compiled.BACKEND", "aot_eager")
    arguments = ["bench", "train", "--model", "mlp", "--image", "1x8x8", "--batch-size", "8", "--repeats", "1"]
    assert run([*arguments, "--methods", "ibp", "--compile"]) == 0
    assert "1 threads, compiled passes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--image", "28x28", "channels, height and width"),
        ("--image", "2x28x28", "1 or 3 channels"),
        ("--attack-steps", "0", "whole numbers of at least 1"),
        ("--methods", "sabr,nothing", "separated by commas"),
        ("--strategies", "single,pair", "some of single, single/4"),
        ("--model", "vgg", "one of"),
        ("--device", "tpu", "cpu or cuda"),
    ],
)
def test_bad_options_are_refused(option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", option, value]) == 2
    printed = capsys.readouterr().err
    assert value.rsplit(",", 1)[-1] in printed
    assert expected in " ".join(printed.split())
