"""The command line: one clear error for bad input, exit statuses, what each verb prints. No Ray here."""

import json
from pathlib import Path

import pytest

from cactus_ray import __version__, cli

SPACES = Path(__file__).parents[2] / "search_spaces"
SMOKE = str(SPACES / "smoke.yaml")
FIXED = [
    *("--set", "method=cactus", "--set", "learning_rate=0.003", "--set", "compression_set.high=0.75"),
    *("--set", "train.epochs=2", "--set", "model.name=mlp", "--set", "model.hidden=[16]"),
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "network.safetensors"
    assert cli.run(["train", SMOKE, *FIXED, "--out", str(path)]) == 0
    return path


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"cactus-ray {__version__}"
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("search", "status", "report", "pick", "check", "train", "verify"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["search", "nowhere.yaml"], ["nowhere.yaml", "expected"]),
        (["search", SMOKE, "--set", "threat.epsilon=-1"], ["threat.epsilon", "-1", "[0.0, 1.0]"]),
        (["search", SMOKE, "--set", "threat.epsilon=.nan"], ["threat.epsilon", "nan"]),
        (["search", SMOKE, "--set", "learning_rat=0.1"], ["--set", "learning_rat"]),
        (["search", SMOKE, "--set", "learning_rate"], ["'learning_rate'", "KEY=VALUE"]),
        (["search", SMOKE, "--name", "../x"], ["--name", "'../x'"]),
        (["search", SMOKE, "--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["train", SMOKE], ["learning_rate", "--set"]),
        (["train", SMOKE, *FIXED, "--set", "awp_unit=int4"], ["smoke.yaml: parameters.awp_unit", "awp_radius above 0"]),
        (["train", SMOKE, *FIXED, "--out", "network.bin"], ["'network.bin'", ".safetensors"]),
        (["train", SMOKE, *FIXED, "--set", "threat.epsilon=2"], ["threat.epsilon", "2"]),
        (["status", "nowhere"], ["nowhere", "expected"]),
        (["report", "nowhere"], ["nowhere", "expected"]),
        (["pick", "nowhere", "--out", "x", "--max-bytes", "fourty"], ["--max-bytes", "'fourty'"]),
        (["pick", "nowhere", "--out", "x", "--min-certified", "1.5"], ["--min-certified", "'1.5'"]),
        (["pick", "nowhere", "--out", "x", "--prefer", "speed"], ["--prefer", "'speed'", "bytes"]),
        (["pick", "nowhere.safetensors", "--level", "int8", "--out", "x"], ["nowhere.safetensors", "cannot be read"]),
        (["pick", "nowhere.safetensors", "--out", "x"], ["--level", "--level int8"]),
        (["pick", "nowhere.safetensors", "--level", "int7", "--out", "x"], ["level", "'int7'"]),
        (["pick", "no.safetensors", "--level", "int8", "--max-bytes", "9k", "--out", "x"], ["--max-bytes", "nothing"]),
        (["pick", "no.safetensors", "--level", "int8", "--prefer", "bytes", "--out", "x"], ["--prefer", "nothing"]),
        (["check", "nowhere"], ["nowhere"]),
        (["verify", "nowhere.onnx", "--data", "digits", "--epsilon", "0.1"], ["nowhere.onnx"]),
        (["verify", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["verify", "nowhere.safetensors", "--split", "dev"], ["--split", "'dev'", "selection"]),
    ],
)
def test_bad_input_is_one_error_and_status_2(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    for word in named:
        assert word in shown


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["search", SMOKE, "--trails", "3"]) == 2
    assert "--trails" in capsys.readouterr().err


def test_broken_yaml_names_line_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\ndata: {name: digits\nmodel: y\n")
    assert cli.run(["search", str(broken)]) == 2
    shown = capsys.readouterr().err
    assert "broken.yaml" in shown
    assert "line" in shown


def test_verify_reads_a_network_file_at_several_levels_and_radii(
    network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(network), "--levels", "dense,int4", "--epsilon", "0.0,0.05", "--samples", "30", "--json"]
    assert cli.run(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["level"], row["epsilon"]) for row in rows] == [
        ("dense", 0.0), ("dense", 0.05), ("int4", 0.0), ("int4", 0.05),
    ]  # fmt: skip
    for row in rows:
        assert row["n_certified"] + row["n_falsified"] + row["n_unknown"] == row["samples"] == 30
    exact, wider = rows[0], rows[1]
    assert exact["n_unknown"] == 0  # at radius 0 every bound is exact
    assert exact["certified_accuracy"] == exact["standard_accuracy"] > 0.3
    assert wider["n_certified"] <= exact["n_certified"]


def test_the_code_of_a_factory_is_not_imported_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", SMOKE, *FIXED[:-4], "--set", "model={factory: 'os:getcwd'}"]) == 2
    assert "--trust-code" in capsys.readouterr().err


def test_a_network_with_an_unknown_operator_is_refused_by_name_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def squashed(input_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    space = (SPACES / "smoke.yaml").read_text().replace("{name: cnn_small}", "{factory: 'own_networks:squashed'}")
    (tmp_path / "own.yaml").write_text(space)
    runs = tmp_path / "runs"
    assert cli.run(["search", str(tmp_path / "own.yaml"), "--trust-code", "--runs", str(runs)]) == 2
    assert "Sigmoid" in capsys.readouterr().err
    assert not runs.exists()


def test_a_loss_that_is_not_finite_ends_with_its_step_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "network.safetensors"
    assert cli.run(["train", SMOKE, *FIXED, "--set", "train.l1=1e38", "--out", str(path)]) == 1
    assert "not finite at step 1" in capsys.readouterr().err
    assert not path.exists()


def test_a_users_own_residual_network_is_trained_and_certified_at_every_kind_of_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    space, network = tmp_path / "own.yaml", tmp_path / "own.safetensors"
    factory = "{factory: 'own_network:residual'}"
    space.write_text((SPACES / "smoke.yaml").read_text().replace("{name: cnn_small}", factory))
    assert cli.run(["train", str(space), *FIXED[:-4], "--trust-code", "--out", str(network)]) == 0
    capsys.readouterr()
    levels = "dense,prune:gs-l2:0.25+rebn+int8,prune:gu-grad:0.5+int4,bf16"
    arguments = ["verify", str(network), "--levels", levels, "--epsilon", "0.01", "--samples", "40", "--json"]
    assert cli.run(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in rows] == levels.split(",")
    assert rows[0]["standard_accuracy"] > 0.5
    assert rows[0]["n_certified"] > 0
