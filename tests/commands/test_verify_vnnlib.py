"""``cactus-ray verify MODEL.onnx --vnnlib SPEC``: the file of the result, its witness, exit statuses."""

import errno
import gzip
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cactus_ray import cli
from cactus_ray.bounds import linear
from cactus_ray.commands import vnnlib
from cactus_ray.interchange import run as runtime

IMAGE = (1, 4, 4, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normalisation, channels last, a convolution, a leaky ReLU, a dense layer; written as other tools write."""
    random = np.random.default_rng(0)
    constants = {
        "mean": np.array([0.25, 0.5], np.float32), "std": np.array([0.3, 0.7], np.float32),
        "K": random.normal(size=(3, 2, 2, 2)).astype(np.float32) / 3,
        "W": random.normal(size=(27, 3)).astype(np.float32) / 4, "w": random.normal(size=3).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("Div", ["a", "std"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "K"], ["d"]),
        helper.make_node("LeakyRelu", ["d"], ["e"], alpha=0.1),
        helper.make_node("Transpose", ["e"], ["f"], perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "W", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "other", [helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("model") / "other.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def outputs(model: Path, values: list[float]) -> list[float]:
    session = runtime.session(model.read_bytes())
    image = np.array(values, np.float32).reshape(IMAGE)
    return runtime.run(session, {"x": image})[0][0].tolist()


def specification(model: Path, radius: float, shift: float, path: Path) -> list[float]:
    """Around a fixed image, unsafe where another output is above that of the image's class plus ``shift``."""
    image = np.random.default_rng(1).random(32).round(3).tolist()
    clean = outputs(model, image)
    label = int(np.argmax(clean))
    lines = [f"(declare-const X_{i} Real)" for i in range(32)] + [f"(declare-const Y_{j} Real)" for j in range(3)]
    lines += [
        f"(assert (<= X_{i} {v + radius:.6f}))\n(assert (>= X_{i} {v - radius:.6f}))" for i, v in enumerate(image)
    ]
    others = " ".join(f"(and (>= Y_{j} (+ Y_{label} {shift})))" for j in range(3) if j != label)
    text = "\n".join([*lines, f"(assert (or {others}))"])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return image


def test_unsat_from_a_packed_specification(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, result = tmp_path / "spec.vnnlib.gz", tmp_path / "out" / "result.txt"
    specification(model, 0.002, 0.0, path)
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--timeout", "60", "--out", str(result)]) == 0
    assert result.read_text() == "unsat\n"
    assert capsys.readouterr().out == "unsat\n"


def test_sat_has_a_witness_that_replays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, result = tmp_path / "spec.vnnlib", tmp_path / "result.txt"
    image = specification(model, 1.5, 0.0, path)
    label = int(np.argmax(outputs(model, image)))
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--out", str(result)]) == 0
    assert capsys.readouterr().out == result.read_text()
    answer, rest = result.read_text().split("\n", 1)
    assert answer == "sat"
    assert re.fullmatch(r"\(\((X|Y)_\d+ \S+\)(\n\((X|Y)_\d+ \S+\))*\)\n", rest)
    values = {name: float(v) for name, v in re.findall(r"\(([XY]_\d+) ([^()\s]+)\)", rest)}
    assert list(values) == [f"X_{i}" for i in range(32)] + [f"Y_{j}" for j in range(3)]
    x, y = [values[f"X_{i}"] for i in range(32)], [values[f"Y_{j}"] for j in range(3)]
    assert outputs(model, x) == y
    assert max(v for j, v in enumerate(y) if j != label) >= y[label]
    assert all(abs(a - b) <= 1.5 + 1e-6 for a, b in zip(x, image, strict=True))


def test_timeout_unknown_and_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spec.vnnlib"
    specification(model, 0.002, 0.0, path)
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--timeout", "1e-6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == "timeout"
    monkeypatch.setattr(linear.Relaxed, "lower_bounds", lambda self, rows: torch.full((1, 1), torch.nan).double())
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--timeout", "1"]) == 0
    assert capsys.readouterr().out in ("timeout\n", "unknown\n")  # NaN proves nothing


def test_a_wrong_bound_ends_the_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, result = tmp_path / "spec.vnnlib", tmp_path / "result.txt"
    specification(model, 0.002, 0.0, path)
    true = linear.Relaxed.lower_bounds
    monkeypatch.setattr(linear.Relaxed, "lower_bounds", lambda self, rows: true(self, rows) + 100)
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--out", str(result)]) == 1
    assert "unsound bound" in capsys.readouterr().err
    assert not result.exists()


def test_where_the_result_goes_is_tried_before_it_is_looked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spec.vnnlib"
    specification(model, 0.002, 0.0, path)
    monkeypatch.setattr(vnnlib, "decide", lambda *_, **__: pytest.fail("the answer is looked for"))
    for result in (path / "x" / "result.txt", tmp_path):
        assert cli.run(["verify", str(model), "--vnnlib", str(path), "--out", str(result)]) == 2
        shown = capsys.readouterr().err
        assert f"--out {result}" in shown
        assert "expected" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["spec.vnnlib"]


def test_an_answer_that_cannot_be_written_is_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, result = tmp_path / "spec.vnnlib", tmp_path / "out" / "result.txt"
    specification(model, 0.002, 0.0, path)

    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.run(["verify", str(model), "--vnnlib", str(path), "--timeout", "60", "--out", str(result)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "unsat\n"
    assert f"--out {result}: cannot be written (No space left on device)" in shown.err


def test_bad_input_has_status_2(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.vnnlib"
    specification(model, 0.1, 0.0, path)
    for arguments, words in (
        ([str(model), "--vnnlib", str(tmp_path / "none.vnnlib")], ["none.vnnlib", "cannot be read"]),
        ([str(tmp_path / "none.onnx"), "--vnnlib", str(path)], ["none.onnx", "cannot be read"]),
        ([str(tmp_path / "net.safetensors"), "--vnnlib", str(path)], [".onnx"]),
        ([str(model), "--vnnlib", str(path), "--timeout", "0"], ["--timeout", "above 0"]),
        ([str(model), "--vnnlib", str(path), "--data", "digits"], ["--data", "--vnnlib"]),
        ([str(model), "--vnnlib", str(path), "--radius"], ["--radius", "--vnnlib"]),
        ([str(model), "--vnnlib", str(path), "--timeout", "0.5", "--out", str(tmp_path)], ["--out"]),
    ):
        assert cli.run(["verify", *arguments]) == 2
        shown = capsys.readouterr().err
        assert all(word in shown for word in words), shown
    (tmp_path / "less.vnnlib").write_text(path.read_text().replace("(declare-const X_31 Real)", ""))
    assert cli.run(["verify", str(model), "--vnnlib", str(tmp_path / "less.vnnlib")]) == 2
    assert "X_31 is not declared" in capsys.readouterr().err


def test_an_operator_that_is_not_understood_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(model)
    proto.graph.node[4].CopyFrom(helper.make_node("Sigmoid", ["d"], ["e"]))
    other, path = tmp_path / "sigmoid.onnx", tmp_path / "spec.vnnlib"
    other.write_bytes(proto.SerializeToString())
    specification(model, 0.1, 0.0, path)
    assert cli.run(["verify", str(other), "--vnnlib", str(path)]) == 2
    assert "'Sigmoid'" in capsys.readouterr().err
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(model.read_bytes()[:-100])
    assert cli.run(["verify", str(truncated), "--vnnlib", str(path)]) == 2
