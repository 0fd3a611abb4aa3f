"""``cactus-ray verify --family`` and ``cactus-ray pick --family``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cactus_ray import cli

SMOKE = str(Path(__file__).parents[2] / "search_spaces" / "smoke.yaml")
FIXED = [
    *("--set", "method=cactus", "--set", "learning_rate=0.003", "--set", "compression_set.high=0.75"),
    *("--set", "train.epochs=2", "--set", "model.name=mlp", "--set", "model.hidden=[16]"),
]
COMMON = ("--epsilon", "0.02", "--samples", "20")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("train") / "network.safetensors"
    assert cli.run(["train", SMOKE, *FIXED, "--out", str(path)]) == 0
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.run(["verify", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_family_is_certified_by_level(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    levels = ("--levels", "dense,prune:gu-l1:0.5")
    alone = shown(capsys, str(network), *COMMON, *levels)
    half, one = (
        shown(capsys, str(network), *COMMON, *levels, "--family", "int8", "--family-radius", r) for r in ("half", "one")
    )
    assert [row["family"]["zeros"] for row in half] == ["free", "fixed"]
    for a, b, c in zip(alone, half, one, strict=True):
        assert a["n_certified"] >= b["n_certified"] >= c["n_certified"] > 0
        assert "family" not in a
        assert c["family"]["radius"] == "one"
    free = shown(capsys, str(network), *COMMON, *levels, "--family", "int8", "--family-zeros", "free")
    assert [row["family"]["zeros"] for row in free] == ["free", "free"]
    assert cli.run(["verify", str(network), *COMMON, "--family", "int4"]) == 0
    assert "half a quantisation step of int4" in capsys.readouterr().out


def test_results_are_recorded_with_their_members_and_resumed(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    arguments = [str(network), *COMMON, "--family", "int4", "--out", str(path)]
    first = shown(capsys, *arguments)
    rows = [json.loads(line)["result"] for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 20
    assert all(("member" in row) == (row["verdict"] == "FALSIFIED") for row in rows)
    before = path.read_bytes()
    assert shown(capsys, *arguments) == first
    assert path.read_bytes() == before
    for other in (["--family", "int8"], ["--family", "int4", "--family-radius", "one"], []):
        assert cli.run(["verify", str(network), *COMMON, *other, "--out", str(path)]) == 2
        assert "family" in capsys.readouterr().err


def test_an_onnx_file_is_a_centre(tmp_path: Path, network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cactus_ray.config import DataConfig
    from cactus_ray.models.network import load
    from cactus_ray.search.evaluate import at_level

    for level in ("dense", "int8"):
        file = at_level(load(network), level, DataConfig(name="digits"), (0.0, 1.0)).file
        (tmp_path / f"{level}.onnx").write_bytes(file)
    capsys.readouterr()
    (row,) = shown(capsys, str(tmp_path / "dense.onnx"), *COMMON, "--family", "int8")
    (same,) = shown(capsys, str(network), *COMMON, "--family", "int8")
    assert row == same
    assert cli.run(["verify", str(tmp_path / "int8.onnx"), *COMMON, "--family", "int8"]) == 2
    assert "a level without integers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--family", "int9"], "--family: got 'int9'"),
        (["--family", "w8a8"], "--family: got 'w8a8'"),
        (["--family", "int8", "--levels", "w8a8"], "--levels: got 'w8a8'"),
        (["--family", "int8", "--family-radius", "two"], "--family-radius: got 'two'"),
        (["--family", "int8", "--family-zeros", "no"], "--family-zeros: got 'no'"),
        (["--family", "int8", "--levels", "int4"], "--levels: got 'int4'"),
        (["--family", "int8", "--radius"], "--radius"),
        (["--family-radius", "one"], "--family-radius: got 'one'; expected --family"),
        (["--family-zeros", "free"], "--family-zeros: got 'free'; expected --family"),
    ],
)
def test_bad_options_are_one_clear_line(
    network: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", str(network), *COMMON, *options]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
