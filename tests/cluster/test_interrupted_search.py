"""Real searches that are interrupted: status, words, the command that goes on, and no process of Ray is left."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import adopting, leftovers

from cactus_ray.search.store import read_records

SMOKE = Path(__file__).parents[2] / "search_spaces" / "smoke.yaml"
WORDS = "interrupted; what is finished is kept; go on with: "
PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'cactus-ray'; from cactus_ray.cli import main; main()"]

pytestmark = pytest.mark.ray


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its sessions; a short path, because of its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def interrupted_when(reached: Callable[[], bool], number: signal.Signals, *words: object) -> list[str]:
    """Interrupt a search when it has come so far, and return the command that it says goes on."""
    command = [*PROGRAM, *(str(word) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.count(WORDS) == 1, err
    assert "Traceback" not in err
    return shlex.split(err.partition(WORDS)[2].splitlines()[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_during_rays_start(tmp_path: Path, ray_folder: Path, number: signal.Signals) -> None:
    with adopting():
        command = interrupted_when(
            lambda: any(ray_folder.rglob("gcs_server.out")), number,
            "search", SMOKE, "--runs", tmp_path, "--set", "wandb.mode=disabled",
        )  # fmt: skip
        assert leftovers() == {}
    assert command == ["cactus-ray", "search", "--resume", "smoke", "--runs", str(tmp_path)]


def test_in_the_middle_and_the_command_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    records = runs / "mine" / "trials.jsonl"
    with adopting():
        command = interrupted_when(
            lambda: records.exists() and '"event":"epoch"' in records.read_text(), signal.SIGTERM,
            "search", SMOKE, "--runs", runs, "--name", "mine", "--storage", tmp_path / "scratch",
            "--set", "wandb.mode=disabled", "--set", "search.concurrency=1",
        )  # fmt: skip
        assert leftovers() == {}
    found = read_records(runs / "mine")
    assert found.finished is not None
    assert found.finished["status"] == "interrupted"
    assert (runs / "mine" / "report.html").exists()
    assert command[:4] == ["cactus-ray", "search", "--resume", "mine"]
    again = subprocess.run([*PROGRAM, *command[1:]], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert again.returncode == 0, again.stderr
    assert [trial.status for trial in read_records(runs / "mine").trials.values()] == ["completed"] * 3
