"""How an interrupted search ends: status 130 and one line with the command that goes on, whatever it was at."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cactus_ray import cli, interrupts
from cactus_ray.commands import search as search_command
from cactus_ray.report.resume import begun_as, go_on, keeps, resume_arguments
from cactus_ray.report.terminal import print_front, print_status
from cactus_ray.search.document import dump_yaml
from cactus_ray.search.space import load_space
from cactus_ray.search.store import read_records

SMOKE = Path(__file__).parents[2] / "search_spaces" / "smoke.yaml"
WORDS = "interrupted; what is finished is kept; go on with: "
BOTH = pytest.mark.parametrize("number", interrupts.SIGNALS, ids=lambda number: signal.Signals(number).name)

HELD = """
import signal, sys, time
from pathlib import Path
from cactus_ray import cli

phase, folder = sys.argv[1], Path(sys.argv[2])
sys.argv = ["cactus-ray", *sys.argv[3:]]

def hold(until):
    (folder / "reached").touch()
    while not until():
        time.sleep(0.01)

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            hold(lambda: False)

def start(**options):  # as Ray does: with its own handler of SIGTERM, and not to be torn
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    hold((folder / "go on").exists)
    raise AssertionError("Ray is not to start here")

if phase == "imports":
    sys.meta_path.insert(0, Import())
else:
    import ray
    ray.init = start
cli.main()
"""


@BOTH
@pytest.mark.parametrize("phase", ["imports", "ray"])
def test_a_signal_during_the_start_has_the_status_and_the_words(
    tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    typed = ["search", str(SMOKE), "--runs", str(tmp_path / "my runs"), "--trials", "2", "--set", "wandb.mode=disabled"]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, phase, str(tmp_path), *typed], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    (tmp_path / "go on").touch()
    out, err = process.communicate()
    assert process.returncode == 130, err
    lines = [line for line in err.splitlines() if not line.startswith("study smoke")]
    if phase == "imports":
        expected = typed
    else:  # the records are there
        expected = ["search", "--resume", "smoke", "--runs", str(tmp_path / "my runs")]
        assert read_records(tmp_path / "my runs" / "smoke").finished is None
    assert lines == [WORDS + shlex.join(["cactus-ray", *expected])]
    assert out == ""


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: object) -> str:
    """The last line of a search that is interrupted in its middle; it has begun its records, as a real one does."""

    def interrupted(space: Any, options: Any) -> None:
        options.run.mkdir(parents=True, exist_ok=True)
        (options.run / "space.yaml").write_text(dump_yaml(space.to_dict()))
        (options.run / "trials.jsonl").write_text('{"event": "study", "time": 1.0}\n')
        raise KeyboardInterrupt

    monkeypatch.setattr(search_command, "search", interrupted)
    monkeypatch.setattr(sys, "argv", ["cactus-ray"])
    assert cli.run([str(word) for word in ("search", SMOKE, *typed)]) == 130
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert found.out == ""
    return found.err.rstrip("\n").removeprefix(WORDS)


def test_what_the_records_do_not_keep_is_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(monkeypatch, capsys, "--trials", 5) == "cactus-ray search --resume smoke"
    monkeypatch.setattr(search_command, "load_network", lambda path: path)
    monkeypatch.setattr(search_command, "pack", lambda network: b"")
    typed = ("--name", "mine", "--runs", tmp_path / "a b", "--address", "auto", "--storage", "/mnt/it's",
             "--init", "net.safetensors", "--trust-code", "--json", "--seed", 3)  # fmt: skip
    found = shlex.split(ended(monkeypatch, capsys, *typed))
    assert found == [
        "cactus-ray", "search", "--resume", "mine", "--runs", str(tmp_path / "a b"), "--address", "auto", "--storage",
        "/mnt/it's", "--init", "net.safetensors", "--trust-code", "--json",
    ]  # fmt: skip


def test_a_run_that_was_not_replaced_yet_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(monkeypatch, capsys, "--runs", tmp_path)
    found = ended(monkeypatch, capsys, "--runs", tmp_path, "--from-scratch")  # the old records came back
    assert shlex.split(found) == ["cactus-ray", "search", str(SMOKE), "--runs", str(tmp_path), "--from-scratch"]


def test_a_space_that_was_not_written_yet_is_asked_for_again(tmp_path: Path) -> None:
    space = load_space(SMOKE)
    assert not keeps(tmp_path, space)
    assert begun_as(tmp_path) is None
    (tmp_path / "space.yaml").write_text(dump_yaml(space.to_dict()))
    (tmp_path / "trials.jsonl").write_text("one\ntwo\n")
    assert keeps(tmp_path, space)
    assert not keeps(tmp_path, load_space(SMOKE, {"search.trials": "77"}))
    assert begun_as(tmp_path) == b"one\n"


def test_another_verb_says_no_more_than_that_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cactus_ray.commands.pick.check", interrupted)
    assert cli.run(["check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("status", ["interrupted", "completed"])
def test_status_and_report_say_the_same_words(tmp_path: Path, status: str) -> None:
    run = tmp_path / "smoke"
    run.mkdir()
    (run / "space.yaml").write_text(dump_yaml(load_space(SMOKE).to_dict()))
    events = [
        '{"event": "study", "schema": 1, "time": 1.0, "name": "smoke", "seed": 0, "reference_point": {}}',
        f'{{"event": "finished", "status": "{status}", "seconds": 1.0, "time": 2.0}}',
    ]
    (run / "trials.jsonl").write_text("\n".join(events) + "\n")
    for show in (print_status, print_front):
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        show(console, run, read_records(run), as_json=False)
        console.file.close()
        expected = go_on(["cactus-ray", *resume_arguments(run)])
        assert (expected in console.export_text()) == (status == "interrupted")
