"""A user's own network on the command line: what is said about it, and what is refused before anything starts."""

import json
from pathlib import Path

import pytest
import torch

from cactus_ray import cli
from cactus_ray.commands import search
from cactus_ray.models.network import load

SMOKE = (Path(__file__).parents[2] / "search_spaces" / "smoke.yaml").read_text()
ONE = ("--set", "method=ibp", "--set", "learning_rate=0.003", "--set", "train.epochs=1")
ONE_EPOCH_OF_FEW = (*ONE, "--set", "train.epoch_fraction=0.1", "--trust-code")


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "models")


def space(folder: Path, factory: str, methods: str = "[cactus, ibp]") -> Path:
    text = SMOKE.replace("{name: cnn_small}", f"{{factory: 'brought_networks:{factory}'}}")
    file = folder / f"{factory}.yaml"
    file.write_text(text.replace("[cactus, ibp]", methods))
    return file


def test_train_says_what_it_keeps_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tmp_path / "network.safetensors"
    arguments = ["train", str(space(tmp_path, "frozen")), *ONE_EPOCH_OF_FEW, "--out", str(network), "--json"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["network"] == str(network)
    assert "brought_networks:frozen sets requires_grad=False for 0.weight: training leaves it as it is" in shown.err
    params = load(network).params
    assert torch.equal(params["0.weight"], torch.full((4, 1, 3, 3), 0.123))


@pytest.mark.parametrize(
    ("options", "said"), [((), True), (("--set", "train.initialization=default"), False)], ids=["ibp", "default"]
)
def test_train_says_which_weights_the_initialisation_does_not_touch(
    options: tuple[str, ...], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, network = space(tmp_path, "loaded"), tmp_path / "network.safetensors"
    assert cli.run(["train", str(file), *ONE_EPOCH_OF_FEW, *options, "--out", str(network)]) == 0
    line = "brought_networks:loaded sets 0.weight itself: training starts from these values"
    assert (line in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("factory", "methods", "words"),
    [
        ("weight_norm", "[cactus, ibp]", "torch.nn.utils.parametrize.remove_parametrizations(layer,"),
        ("tied", "[cactus, ibp]", "'first.weight' and 'second.weight' are one tensor"),
        ("other_layers_each_time", "[cactus, ibp]", "other layers at every call"),
        ("group_norm", "[cactus, ibp]", "module GroupNorm ('1') is not understood"),
        ("frozen", "[cactus, hydra]", "method: got 'hydra'; expected one of cactus"),
    ],
)
def test_search_refuses_before_anything_starts(
    factory: str, methods: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    file = space(tmp_path, factory, methods)
    assert cli.run(["search", str(file), "--trust-code", "--runs", str(runs)]) == 2
    shown = capsys.readouterr().err
    assert words in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not runs.exists()


def test_search_says_what_every_trial_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "estimate", lambda *arguments: None)
    monkeypatch.setattr(search, "print_estimate", lambda *arguments, as_json: None)
    text = space(tmp_path, "frozen_stem").read_text()
    several = "parameters:\n  model.factory: {values: ['brought_networks:loaded', 'brought_networks:frozen_stem']}\n"
    text = text.replace("model: {factory: 'brought_networks:frozen_stem'}\n", "model: {}\n")
    file = tmp_path / "several.yaml"
    file.write_text(text.replace("parameters:\n", several, 1))
    assert cli.run(["search", str(file), "--trust-code", "--runs", str(tmp_path / "runs"), "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert "brought_networks:loaded sets 0.weight itself" in shown
    assert "frozen_stem sets requires_grad=False for 0.bias, 0.weight, 1.bias and 1 more tensors: training" in shown
