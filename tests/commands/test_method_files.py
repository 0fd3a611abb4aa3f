"""Every method with a loss to choose, from a search space to a file that onnxruntime runs and ``verify`` reads."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cactus_ray import cli
from cactus_ray.bounds.graph import forward
from cactus_ray.config import DataConfig
from cactus_ray.data import load_split
from cactus_ray.models.network import load
from cactus_ray.options import METHOD_OPTIONS
from cactus_ray.search.evaluate import at_level

METHODS_DIGITS = str(Path(__file__).parents[2] / "search_spaces" / "methods_digits.yaml")
LEVELS = "dense,int8,prune:lu-l1:0.9,prune:gs-l2:0.5+int4"
FIXED = {
    "learning_rate": "0.005", "standard_weight": "0.3", "certified_loss": "ibp", "train.epochs": "6",
    "model.name": "mlp", "model.hidden": "[32]", "threat.epsilon": "0.05", "compression_set.strategy": "single",
    "compression_set.high": "0.75", "awp_radius": "0.5", "target_sparsity": "0.9", "weight_bits": "4",
    "nrs_weight": "0.01", "awp_gamma": "0.01", "mask_noise": "0.25",
}  # fmt: skip


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_train_compress_verify_export(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.safetensors"
    settings = [argument for key, value in FIXED.items() for argument in ("--set", f"{key}={value}")]
    assert cli.run(["train", METHODS_DIGITS, "--set", f"method={method}", *settings, "--out", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["standard_accuracy"] > 0.6
    assert summary["ibp_certified_accuracy"] > 0.3

    options = ["--samples", "40", "--bound", "ibp", "--json"]
    assert cli.run(["verify", str(path), "--levels", LEVELS, *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in rows] == LEVELS.split(",")
    certified = {row["level"]: row["n_certified"] for row in rows}
    assert certified["dense"] >= 10
    if method == "hydra":
        assert certified["prune:lu-l1:0.9"] == certified["dense"]

    network = load(path)
    images, _ = load_split("digits", "selection")
    deployed = at_level(network, "dense", DataConfig(name="digits"), (0.0, 1.0))
    (tmp_path / "model.onnx").write_bytes(deployed.file)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[:16].numpy()})
    torch.testing.assert_close(
        torch.from_numpy(np.asarray(logits)), forward(network.graph, network.params, images[:16])
    )
    arguments = [str(tmp_path / "model.onnx"), "--data", "digits", "--epsilon", "0.05", *options]
    assert cli.run(["verify", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n_certified"] == certified["dense"]
