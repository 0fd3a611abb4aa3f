"""``cactus-ray verify --threat semantic``, and that it shares nothing with linf certificates."""

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
SEMANTIC = ("--threat", "semantic", "--transform", "rotation:10", "--flip", "0.05", "--samples", "20")
OF_LINF = ("certif", "falsif", "unknown", "verdict", "epsilon", "counterexample", "linf")
ADDRESS = {"level", "split", "threat", "transform"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("train") / "network.safetensors"
    assert cli.run(["train", SMOKE, *FIXED, "--out", str(path)]) == 0
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.run(["verify", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_levels_and_transformations(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transforms = "rotation:0,rotation:10,noise:0.05+brightness:0.1"
    rows = shown(capsys, str(network), *SEMANTIC[:3], transforms, *SEMANTIC[4:], "--levels", "dense,int4")
    assert [(row["level"], row["transform"]) for row in rows] == [
        (level, transform) for level in ("dense", "int4") for transform in transforms.split(",")
    ]
    for row in rows:
        parts = [row[f"semantic_n_{name}"] for name in ("hold", "open", "misclassified")]
        assert sum(parts) == row["semantic_samples"] == 20
        assert row["semantic_n_hold_jointly"] <= row["semantic_n_hold"]
        assert row["semantic_draws"] == 149  # 0.95 ** 149 < 0.01 / 20
    nothing = rows[0]
    assert nothing["semantic_n_open"] == 0
    assert nothing["semantic_n_hold_jointly"] == nothing["semantic_n_hold"] > 5
    assert shown(capsys, str(network), *SEMANTIC) == [rows[1]]  # alone as among others
    assert cli.run(["verify", str(network), *SEMANTIC]) == 0
    text = capsys.readouterr().out
    assert "uniform in [-10, 10] degrees" in text
    assert "jointly" in text
    assert "99 %" in text


def test_the_file_is_what_runs(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cactus_ray.config import DataConfig
    from cactus_ray.models.network import load
    from cactus_ray.search.evaluate import at_level

    file = tmp_path / "int8.onnx"
    file.write_bytes(at_level(load(network), "int8", DataConfig(name="digits"), (0.0, 1.0)).file)
    assert shown(capsys, str(file), *SEMANTIC) == shown(capsys, str(network), *SEMANTIC, "--levels", "int8")


def test_counts_are_recorded_and_resumed(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = tmp_path / "semantic.jsonl", tmp_path / "part.jsonl"
    arguments = [str(network), *SEMANTIC, "--draws", "150"]
    expected = shown(capsys, *arguments, "--out", str(whole))
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 20
    part.write_text("".join(lines[:8]) + lines[8][:15])  # killed inside a line
    assert shown(capsys, *arguments, "--out", str(part)) == expected
    assert part.read_text().startswith("".join(lines[:8]))
    assert len(part.read_text().splitlines()) == 1 + 20 + 1  # the torn line stays and is not counted
    before = whole.read_bytes()
    # counts do not depend on what is claimed with them
    (other,) = shown(capsys, *arguments, "--confidence", "0.9", "--out", str(whole))
    assert whole.read_bytes() == before
    assert other["semantic_n_hold"] >= expected[0]["semantic_n_hold"]
    for changed, key in ((["--draws", "200"], "semantic_draws"), (["--levels", "int8"], "files")):
        assert cli.run(["verify", *arguments, *changed, "--out", str(whole)]) == 2
        assert key in capsys.readouterr().err
    assert whole.read_bytes() == before


def test_nothing_is_shared_with_linf(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    semantic, linf = tmp_path / "semantic.jsonl", tmp_path / "linf.jsonl"
    of_linf = [str(network), "--samples", "5", "--epsilon", "0.02"]
    (ours,) = shown(capsys, str(network), *SEMANTIC, "--out", str(semantic))
    (theirs,) = shown(capsys, *of_linf, "--out", str(linf))
    assert all(key.startswith("semantic_") for key in ours.keys() - ADDRESS)
    assert ours.keys() & theirs.keys() == {"level", "split"}
    for text in (json.dumps(ours), semantic.read_text()):
        assert not [word for word in OF_LINF if word in text.lower()]
    for text in (json.dumps(theirs), linf.read_text()):
        assert "semantic" not in text
        assert "transform" not in text
    for arguments, path in ((of_linf, semantic), ([str(network), *SEMANTIC], linf)):
        before = path.read_bytes()
        assert cli.run(["verify", *arguments, "--out", str(path)]) == 2
        message = capsys.readouterr().err
        assert "other settings" in message
        assert "threat" in message
        assert path.read_bytes() == before


def test_nothing_else_of_the_house_knows_the_threat() -> None:
    """Certificates, points, fronts and pages cannot mix it in: only its own files name it."""
    package = Path(cli.__file__).parent
    named = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "verification.semantic" in (text := path.read_text()) or "semantic_" in text or "n_hold" in text
    }
    assert named == {"commands/semantic.py", "verification/semantic.py"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threat", "l2"], "--threat: got 'l2'; expected linf or semantic"),
        (["--threat", "semantic"], "--transform: got None; expected NAME:AMOUNT"),
        (["--threat", "semantic", "--transform", "spin:3"], "--transform: got 'spin:3'"),
        ([*SEMANTIC, "--draws", "0"], "--draws: got 0"),
        ([*SEMANTIC, "--draws", "20"], "--draws: got 20; expected at least 90"),
        ([*SEMANTIC, "--confidence", "1"], "--confidence: got 1.0"),
        ([*SEMANTIC, "--confidence", "1e-17"], "--confidence: got 1e-17"),
        ([*SEMANTIC[:4], "--flip", "1e-9"], "--flip: got 1e-09"),
        ([*SEMANTIC[:4], "--flip", "1e-6"], "--flip: got 1e-06; expected one that at most 10,000,000 draws"),
        ([*SEMANTIC[:4], "--flip", "nan"], "--flip: got nan"),
        ([*SEMANTIC, "--split", "dev"], "--split: got 'dev'"),
        ([*SEMANTIC, "--epsilon", "0.1"], "--epsilon: this is about linf"),
        ([*SEMANTIC, "--bound", "crown"], "--bound: this is about linf"),
        ([*SEMANTIC, "--radius"], "--radius: this is about linf"),
        ([*SEMANTIC, "--family", "int8"], "--family: this is about linf"),
        ([*SEMANTIC, "--vnnlib", "x.vnnlib"], "--vnnlib: this is about linf"),
        (["--transform", "noise:0.1"], "--transform: this asks for --threat semantic"),
        (["--draws", "100"], "--draws: this asks for --threat semantic"),
    ],
)
def test_bad_options_are_one_clear_line(
    network: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.run(["verify", str(network), *options]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
