"""Files that could end or stall a process are refused before any runtime opens them."""

import json
import subprocess
import sys
from pathlib import Path

import hostile_files
import onnx
import onnxruntime
import pytest

from cactus_ray.deploy.replay import runner
from cactus_ray.errors import UserError
from cactus_ray.interchange import layers
from cactus_ray.interchange.guard import runnable
from cactus_ray.interchange.read import read_onnx

Found = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the command line did with every file, each in a process of its own: a signal cannot end the tests."""
    folder = tmp_path_factory.mktemp("hostile")
    ran = subprocess.run(
        [sys.executable, hostile_files.__file__, str(folder)], check=True, capture_output=True, text=True
    )
    results: Found = json.loads(ran.stdout)
    return results


@pytest.mark.parametrize("case", list(hostile_files.CASES))
def test_verify_ends_with_one_line_that_names_the_node(found: Found, case: str) -> None:
    status, shown = found[case]
    assert status == 2, shown
    assert shown.count("\n") == 1
    assert shown.startswith("error: ")
    assert hostile_files.CASES[case][1] in shown


@pytest.mark.parametrize("case", list(hostile_files.HARMLESS))
def test_what_harms_nobody_is_verified(found: Found, case: str) -> None:
    status, shown = found[case]
    assert status == 0, shown


def test_check_survives_a_division_that_traps(found: Found) -> None:
    status, shown = found["check"]
    assert status == 1, shown
    assert "'the Div'" in shown


@pytest.mark.parametrize("case", list(hostile_files.CASES))
def test_no_runtime_sees_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it is read, nor, of constants, where it is opened without being read."""

    def opened(*arguments: object, **options: object) -> None:
        raise AssertionError("onnxruntime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    data = hostile_files.CASES[case][0]
    with pytest.raises(UserError):
        read_onnx(data)
    if case != "stride 0":  # about a layer, which the reader looks at
        with pytest.raises(UserError):
            runner(data)


def test_a_runtime_gets_the_very_file_unless_parts_of_it_are_not_needed() -> None:
    whole = hostile_files.HARMLESS["positive divisors"]
    assert runnable(whole, "file") is whole
    data = hostile_files.HARMLESS["a division that nothing reads"]
    needed = onnx.load_model_from_string(runnable(data, "file"))
    assert [n.op_type for n in needed.graph.node] == ["Flatten", "Gemm"]
    assert [t.name for t in needed.graph.initializer] == ["W"]


def test_files_of_our_own_are_run_as_they_are() -> None:
    data = (Path(hostile_files.EARLIER) / "model.onnx").read_bytes()
    assert runnable(data, "file") is data


def test_maps_that_would_fill_the_memory_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = hostile_files.large_maps().SerializeToString()
    read_onnx(data)
    monkeypatch.setattr(layers, "LARGEST_VALUES", 16_000)
    with pytest.raises(UserError, match=r"Relu \(node 'the Relu'\): the layers up to it have 1\d{4} outputs"):
        read_onnx(data)
