"""``cactus-ray bench train``."""

from __future__ import annotations

import json

import pytest

from cactus_ray.cli import run


def test_prints_every_method_with_its_efficiency(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "train", "--model", "mlp", "--image", "1x8x8", "--batch-size", "8", "--repeats", "1"]
    assert run([*arguments, "--methods", "ibp,sabr", "--attack-steps", "1,2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(step["name"], step["attack_steps"]) for step in printed["steps"]] == [
        ("ibp", None), ("sabr", 1), ("sabr", 2),
    ]  # fmt: skip
    assert [step["ideal"] for step in printed["steps"]] == [9.0, 11.0, 13.0]
    assert run([*arguments, "--methods", "cactus"]) == 0
    assert "single 1/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--image", "28x28", "channels, height and width"),
        ("--image", "2x28x28", "1 or 3 channels"),
        ("--attack-steps", "0", "whole numbers of at least 1"),
        ("--methods", "sabr,nothing", "separated by commas"),
        ("--model", "vgg", "one of"),
    ],
)
def test_bad_options_are_refused(option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", option, value]) == 2
    printed = capsys.readouterr().err
    assert value.rsplit(",", 1)[-1] in printed
    assert expected in " ".join(printed.split())
