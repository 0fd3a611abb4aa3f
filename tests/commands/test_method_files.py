"""Every method through the commands of a user: train, verify at several levels, pick a level's file, check it."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from cactus_ray import cli
from cactus_ray.bounds.graph import forward
from cactus_ray.commands import single
from cactus_ray.data import load_split
from cactus_ray.models.network import load
from cactus_ray.options import METHODS

METHODS_DIGITS = str(Path(__file__).parents[2] / "search_spaces" / "methods_digits.yaml")
EPSILON = "0.05"
FIXED = {
    "learning_rate": "0.005", "standard_weight": "0.3", "certified_loss": "ibp", "train.epochs": "6",
    "model.name": "mlp", "model.hidden": "[32]", "threat.epsilon": EPSILON, "compression_set.strategy": "single",
    "compression_set.high": "0.75", "awp_radius": "0.5", "target_sparsity": "0.9", "weight_bits": "4",
    "nrs_weight": "0.01", "awp_gamma": "0.01", "mask_noise": "0.25", "box_ratio": "0.8", "ibp_weight": "0.5",
    "attack_radius_factor": "1.0", "tail_layers": "1", "gradient_scale": "4.0", "crown_weight": "0.5",
}  # fmt: skip
SMALL = "prune:gs-l2:0.5+int4"
OWN = {
    "hydra": "prune:lu-l1:0.9", "qa_ibp": "int4", "c_sam": "prune:gu-l1:0.9", "atmc": "lr+sparse:0.1+codebook:4",
}  # fmt: skip
"""The level that a method trains for; all others are compressed without having heard of it."""
KEPT = ("hydra", "qa_ibp", "c_sam")
"""Methods whose finished network its own level does not change any more."""
UNCERTIFIED = ("pgd", "standard")
"""Methods that do not train bounds: of their networks no certificate is expected."""
EFFORT = ["--samples", "40", "--bound", "ibp", "--json"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert cli.run([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_train_verify_export_check(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, results, out = tmp_path / "network.safetensors", tmp_path / "results.jsonl", tmp_path / "picked"
    settings = [argument for key, value in FIXED.items() for argument in ("--set", f"{key}={value}")]
    command = ["train", METHODS_DIGITS, "--set", f"method={method}", *settings, "--out", network, "--json"]
    trained = shown(capsys, *command)
    assert trained["standard_accuracy"] > 0.6
    assert method in UNCERTIFIED or trained["ibp_certified_accuracy"] > 0.3

    levels = ["dense", OWN.get(method, "int8"), SMALL]
    rows = shown(capsys, "verify", network, "--levels", ",".join(levels), *EFFORT, "--out", results)
    assert [row["level"] for row in rows] == levels
    for row in rows:
        assert row["n_certified"] + row["n_falsified"] + row["n_unknown"] == row["samples"] == 40
        assert row["n_certified"] <= round(40 * row["standard_accuracy"])
        assert row["n_falsified"] >= 40 - round(40 * row["standard_accuracy"])
    dense, own, _ = (row["n_certified"] for row in rows)
    assert method in UNCERTIFIED or min(dense, own) >= 10
    if method in KEPT:
        assert own == dense

    level, row = (levels[1], rows[1]) if method in OWN else (SMALL, rows[2])
    picked = shown(capsys, "pick", network, "--level", level, *EFFORT, "--out", out)
    verified = json.loads(results.read_text().splitlines()[0])["settings"]["files"]
    assert picked["sha256"] == verified[level]  # what was verified is what is written
    assert picked["bytes"] == (out / "model.onnx").stat().st_size
    counts = ("n_certified", "n_falsified", "n_unknown")
    assert [picked["test"][key] for key in counts] == [row[key] for key in counts]
    checked = shown(capsys, "check", out, "--json")
    assert checked["ok"]
    assert (checked["certified_again"], checked["replayed"]) == (row["n_certified"], row["n_falsified"])
    (again,) = shown(capsys, "verify", out / "model.onnx", "--epsilon", EPSILON, *EFFORT)
    assert [again[key] for key in counts] == [row[key] for key in counts]

    stored = load(out / "model.safetensors")
    images, _ = load_split("digits", "selection")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[:16].numpy()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(logits)), forward(stored.graph, stored.params, images[:16]))


def test_where_the_network_goes_is_tried_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "run_loop", lambda *_, **__: pytest.fail("it trains"))
    settings = [argument for key, value in FIXED.items() for argument in ("--set", f"{key}={value}")]
    command = ["train", METHODS_DIGITS, "--set", "method=sabr", *settings]
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.last.safetensors").mkdir()
    (tmp_path / "taken.best.safetensors").mkdir()
    before = sorted(tmp_path.iterdir())
    for out in ("file/net.safetensors", "file/deeper/net.safetensors", "taken.safetensors"):
        assert cli.run([*command, "--out", str(tmp_path / out)]) == 2
        shown = capsys.readouterr().err
        assert f"--out {tmp_path / out}: " in shown
        assert "expected" in shown
    assert sorted(tmp_path.iterdir()) == before


def test_a_network_that_cannot_be_written_is_an_error_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(network: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(single, "save", full)
    settings = {**FIXED, "train.epochs": "1", "method": "sabr"}
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    out = tmp_path / "new" / "net.safetensors"
    assert cli.run(["train", METHODS_DIGITS, *arguments, "--out", str(out)]) == 2
    assert f"--out {out}: cannot be written (No space left on device)" in capsys.readouterr().err
