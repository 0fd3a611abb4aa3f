"""``cactus-ray verify``: radii, and results that are recorded and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cactus_ray import cli
from cactus_ray.commands.sources import deployed_files
from cactus_ray.config import ThreatConfig
from cactus_ray.models.network import load as load_network
from cactus_ray.models.network import save

SMOKE = str(Path(__file__).parents[2] / "search_spaces" / "smoke.yaml")
FIXED = [
    *("--set", "method=cactus", "--set", "learning_rate=0.003", "--set", "compression_set.high=0.75"),
    *("--set", "train.epochs=2", "--set", "model.name=mlp", "--set", "model.hidden=[16]"),
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("train") / "network.safetensors"
    assert cli.run(["train", SMOKE, *FIXED, "--out", str(path)]) == 0
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.run(["verify", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_run_goes_on_where_the_first_was_stopped(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    arguments = [str(network), "--epsilon", "0.02,0.05", "--samples", "25", "--seconds-per-sample", "100"]
    expected = shown(capsys, *arguments, "--out", str(whole))
    assert len(lines(whole)) == 1 + 2 * 25
    text = whole.read_text().splitlines(keepends=True)
    kept = text[:31]
    part.write_text("".join(kept) + text[31][:20])  # killed inside a line
    assert shown(capsys, *arguments, "--out", str(part)) == expected
    assert part.read_text().startswith("".join(kept))
    assert len(part.read_text().splitlines()) == 1 + 2 * 25 + 1  # the torn line stays and is not counted
    before = part.read_bytes()
    assert shown(capsys, *arguments, "--out", str(part)) == expected  # nothing is left to do
    assert part.read_bytes() == before
    more = shown(capsys, *arguments[:-3], "30", *arguments[-2:], "--out", str(part))
    assert [row["samples"] for row in more] == [30, 30]


def test_other_settings_are_refused_by_name(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    common = ["verify", str(network), "--samples", "3", "--out", str(path)]
    assert cli.run([*common, "--epsilon", "0.02"]) == 0
    for other, key in (
        (["--epsilon", "0.03"], "epsilon"),
        (["--epsilon", "0.02", "--split", "selection"], "split"),
        (["--epsilon", "0.02", "--seconds-per-sample", "5"], "verification.seconds_per_sample"),
        (["--epsilon", "0.02", "--levels", "int8"], "files"),
        (["--epsilon", "0.02", "--radius"], "radius"),
    ):
        before = path.read_bytes()
        assert cli.run([*common, *other]) == 2
        message = capsys.readouterr().err
        assert "other settings" in message
        assert key in message
        assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["what a nice day\n", "what a nice day", '{"a": 1}\n', "[1]\n", "\x00\n"])
def test_a_file_of_something_else_is_not_touched(
    network: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    assert cli.run(["verify", str(network), "--epsilon", "0.02", "--samples", "3", "--out", str(path)]) == 2
    assert "no file of results" in capsys.readouterr().err
    assert path.read_text() == content


def test_radii_agree_with_verdicts_at_them(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "radii.jsonl"
    common = [str(network), "--samples", "12", "--levels", "dense"]
    found = shown(capsys, *common, "--radius", "--epsilon", "0.1", "--out", str(path))
    assert shown(capsys, *common, "--radius", "--epsilon", "0.1", "--out", str(path)) == found  # read back
    samples = found["samples"]
    assert len(samples) == 12
    radii = [-1.0 if row["certified"] is None else row["certified"] for row in samples]
    assert max(radii) > 0
    assert found["levels"][0]["quantiles"]["1.0"] == max(radii)
    for epsilon in (0.0, 0.01, 0.03):
        (row,) = shown(capsys, *common, "--epsilon", str(epsilon))
        below = sum(r < epsilon - 1 / 1024 for r in radii)
        above = sum(r >= epsilon for r in radii)
        assert above <= row["n_certified"] <= 12 - below
        assert row["n_falsified"] >= sum(r["falsified"] is not None and r["falsified"] < epsilon for r in samples) - 1
    assert cli.run(["verify", *common, "--radius", "--epsilon", "0.1", "--out", str(path)]) == 0
    assert "median" in capsys.readouterr().out


def test_a_file_of_flat_features_and_one_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by another tool: it reads [1, 64], so the images of the data set are flattened and run one by one."""
    random = np.random.default_rng(0)
    constants = {"V": random.normal(size=(64, 8)) / 4, "W": random.normal(size=(8, 10))}
    nodes = [
        helper.make_node("MatMul", ["x", "V"], ["h"]), helper.make_node("LeakyRelu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "W"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "other", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )  # fmt: skip
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    arguments = [str(path), "--data", "digits", "--samples", "40"]
    (row,) = shown(capsys, *arguments, "--epsilon", "0.001")
    assert row["samples"] == 40
    assert row["n_certified"] > 0
    radii = shown(capsys, *arguments, "--radius", "--epsilon", "0.1")["samples"]
    assert sum(r["certified"] is not None for r in radii) == round(40 * row["standard_accuracy"])


def test_a_file_is_verified_in_the_domain_that_it_states(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_network(network)
    assert trained.config is not None
    wide = ThreatConfig(epsilon=0.05, domain=(-1.0, 2.0))
    save(replace(trained, config=replace(trained.config, threat=wide)), tmp_path / "wide.safetensors")
    (level, file), *_ = deployed_files(tmp_path / "wide.safetensors", None, None, None, "test").files
    (tmp_path / "wide.onnx").write_bytes(file)
    common = ("--epsilon", "0.05", "--samples", "60")
    (of_network,) = shown(capsys, str(tmp_path / "wide.safetensors"), *common)
    (of_file,) = shown(capsys, str(tmp_path / "wide.onnx"), *common)
    assert of_file == of_network
    assert (level, of_file["domain"]) == ("dense", [-1.0, 2.0])
    (narrow,) = shown(capsys, str(network), *common)
    assert narrow["domain"] == [0.0, 1.0]
    assert narrow["n_certified"] > of_file["n_certified"]
    assert cli.run(["verify", str(tmp_path / "wide.onnx"), *common]) == 0
    assert "pixels from -1 to 2; bound crown, float32 arithmetic" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stated", ["[1, 0]", "[0, 1", '"wide"', "[0, NaN]", "[0]"])
def test_a_domain_that_is_none_is_refused(
    stated: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, file), *_ = deployed_files(network, None, None, None, "test").files
    model = onnx.load_from_string(file)
    next(entry for entry in model.metadata_props if entry.key == "cactus_ray.domain").value = stated
    onnx.save(model, tmp_path / "odd.onnx")
    assert cli.run(["verify", str(tmp_path / "odd.onnx"), "--epsilon", "0.05"]) == 2
    assert f"metadata cactus_ray.domain: got '{stated}'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "CERTIFIED", "decided_by": "crown", "lower_bound": 1.0, "counterexample": None}, "wrongly"),
        ({"label": 11}, "class 11"),
        ({"certainty": 1}, "no such key"),
    ],
)
def test_recorded_verdicts_that_cannot_be_are_refused(
    change: dict[str, Any], words: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    arguments = ["verify", str(network), "--epsilon", "0.02", "--samples", "40", "--out", str(path)]
    assert cli.run(arguments) == 0
    first, *rows = lines(path)
    wrong = next(row for row in rows if row["result"]["decided_by"] == "clean")
    wrong["result"] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *rows)))
    assert cli.run(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("row", [{"level": "dense"}, {"level": "dense", "result": 3}])
def test_a_row_without_a_result_is_refused(
    row: dict[str, Any], network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "radii.jsonl"
    arguments = ["verify", str(network), "--radius", "--samples", "2", "--out", str(path)]
    assert cli.run(arguments) == 0
    kept = path.read_text()
    path.write_text(kept + json.dumps(row) + "\n")
    assert cli.run(arguments) == 2
    assert "holds no result" in capsys.readouterr().err
    path.write_text(kept + json.dumps({"level": "dense", "result": {"index": 1}}) + "\n")
    assert cli.run(arguments) == 2
    assert "is no such result" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epsilon", "-0.1"], "--epsilon: got -0.1; expected"),
        (["--epsilon", "0", "--radius"], "--epsilon: got '0'; expected more than 0 with --radius"),
        (["--levels", ""], "--levels"),
        (["--levels", "prune:gu-l1"], "prune:FAMILY:SPARSITY"),  # no emoji codes are read in what is said
    ],
)
def test_bad_options_are_named(
    options: list[str], words: str, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", str(network), *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_names_are_printed_as_they_are(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup and colons no emoji, wherever a name comes from."""
    (_, file), *_ = deployed_files(network, None, None, None, "test").files
    model = onnx.load_from_string(file)
    next(entry for entry in model.metadata_props if entry.key == "cactus_ray.level").value = "[/x]:smile:"
    onnx.save(model, tmp_path / "odd.onnx")
    assert cli.run(["verify", str(tmp_path / "odd.onnx"), "--epsilon", "0.05", "--samples", "3"]) == 0
    assert "[/x]:smile:" in capsys.readouterr().out
    assert cli.run(["verify", str(tmp_path / "a:smile:[b].onnx"), "--epsilon", "0.05"]) == 2
    assert "a:smile:[b].onnx" in "".join(capsys.readouterr().err.split())
