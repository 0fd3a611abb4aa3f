"""The main job as a user runs it, in processes of its own: search, kill, resume, report, pick, check."""

import csv
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cactus_ray.search.store import read_records

pytestmark = pytest.mark.ray

SMOKE = Path(__file__).parents[2] / "search_spaces" / "smoke.yaml"
# Long enough that something is certified.
SPACE = [SMOKE, "--set", "train.epochs=12", "--set", "learning_rate=0.005"]
COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]


def environment() -> dict[str, str]:
    """As on a machine without a W&B account."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"NETRC": os.devnull}


def cactus_ray(
    *arguments: object, timeout: float = 240.0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command, whole = [*COMMAND, *(str(a) for a in arguments)], {**environment(), **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=whole, check=False)


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [*COMMAND, *(str(a) for a in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def wait_until_complete(run: Path, process: "subprocess.Popen[str]", count: int, seconds: float = 200.0) -> None:
    """Wait until ``count`` trials are complete while the driver still works."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        if (run / "trials.jsonl").exists():
            statuses = [t.status for t in read_records(run).trials.values()]
            if statuses.count("completed") >= count:
                return
        time.sleep(0.1)
    pytest.fail(f"not {count} complete trials after {seconds} s")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    found = cactus_ray("search", *SPACE, "--runs", runs)
    assert found.returncode == 0, found.stderr
    assert "smoke" in found.stderr + found.stdout
    return runs / "smoke"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_of_a_run_are_there_and_agree(smoke: Path) -> None:
    names = {path.name for path in smoke.iterdir()}
    assert {"space.yaml", "trials.jsonl", "points.csv", "front.csv", "report.html", "checkpoints", "wandb"} <= names
    records = read_records(smoke)
    assert [t.status for t in records.trials.values()] == ["completed"] * 3
    assert records.finished is not None
    assert records.finished["status"] == "completed"
    points, front = rows(smoke / "points.csv"), rows(smoke / "front.csv")
    assert len(points) == 9
    assert front == [p for p in points if p["on_front"] == "True"]
    assert front
    for point in points:
        total = sum(int(point[k]) for k in ("n_certified", "n_falsified", "n_unknown"))
        assert total == int(point["samples"]) == 100
    assert "<html" in (smoke / "report.html").read_text()


def test_wandb_offline_files_hold_the_points_table_and_the_figure(smoke: Path) -> None:
    study = list(smoke.glob("wandb/offline-run-*-study"))
    assert len(study) == 1
    assert len(list(smoke.glob("wandb/offline-run-*/*.wandb"))) == 4  # the study and three trials
    tables = [json.loads(p.read_text()) for p in study[0].glob("files/media/table/**/*.json")]
    assert any({"trial", "level", "certified_accuracy"} <= set(t["columns"]) and len(t["data"]) == 9 for t in tables)
    figures = [json.loads(p.read_text()) for p in study[0].glob("files/media/plotly/**/*.json")]
    assert any(figure["data"] for figure in figures)


def test_a_finished_run_is_kept_when_the_command_runs_again(smoke: Path) -> None:
    before = (smoke / "trials.jsonl").read_bytes()
    again = cactus_ray("search", *SPACE, "--runs", smoke.parent, "--json")
    assert again.returncode == 0, again.stderr
    assert (smoke / "trials.jsonl").read_bytes() == before
    assert json.loads(again.stdout)["points"] == 9


def test_another_space_under_the_same_name_is_refused(smoke: Path) -> None:
    other = cactus_ray("search", *SPACE, "--runs", smoke.parent, "--set", "threat.epsilon=0.07")
    assert other.returncode == 2
    assert "threat.epsilon" in other.stderr
    assert "--from-scratch" in other.stderr


def test_pick_certify_check_and_what_check_finds(smoke: Path, tmp_path: Path) -> None:
    picked = tmp_path / "picked"
    found = cactus_ray("pick", smoke, "--max-bytes", "60k", "--min-accuracy", "0.5", "--out", picked, "--json")
    assert found.returncode in (0, 3), found.stderr  # 3: the test split decided otherwise
    result: dict[str, Any] = json.loads(found.stdout)
    assert result["bytes"] == (picked / "model.onnx").stat().st_size <= 60_000
    assert cactus_ray("check", picked).returncode == 0
    certificate = json.loads((picked / "certificate.json").read_text())
    doubtful = next(v for v in certificate["verdicts"] if v["verdict"] != "CERTIFIED")
    doubtful.update(verdict="CERTIFIED", lower_bound=0.5, decided_by="ibp")
    doubtful.pop("counterexample", None)
    edited = shutil.copytree(picked, tmp_path / "edited")
    (edited / "certificate.json").write_text(json.dumps(certificate))
    assert cactus_ray("check", edited).returncode == 1


def test_nothing_fits_is_status_3_and_names_the_nearest_miss(smoke: Path, tmp_path: Path) -> None:
    found = cactus_ray("pick", smoke, "--max-bytes", "1k", "--out", tmp_path / "picked")
    assert found.returncode == 3
    assert "nearest miss" in found.stderr
    assert "--max-bytes" in found.stderr
    assert not (tmp_path / "picked").exists()


def test_a_killed_search_leaves_readable_records_and_goes_on(tmp_path: Path) -> None:
    run, space = tmp_path / "smoke", ("search", SMOKE, "--runs", tmp_path, "--set", "search.concurrency=1")
    process = start(*space)
    wait_until_complete(run, process, 1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = read_records(run).points()
    assert before
    assert cactus_ray("report", run).returncode == 0
    assert (run / "report.html").exists()
    assert len(rows(run / "points.csv")) == len(before)
    resumed = cactus_ray(*space)
    assert resumed.returncode == 0, resumed.stderr
    records = read_records(run)
    assert [t.status for t in records.trials.values()] == ["completed"] * 3
    assert records.points()[: len(before)] == before


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    process = start("search", SMOKE, "--runs", tmp_path, "--set", "search.concurrency=1", "--trials", 50)
    wait_until_complete(run, process, 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    records = read_records(run)
    assert records.finished is not None
    assert records.finished["status"] == "interrupted"
    assert len(rows(run / "points.csv")) == len(records.points()) > 0
    assert (run / "report.html").exists()


def test_a_running_ray_is_joined_and_a_wrong_token_refused(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, client_port = one.getsockname()[1], two.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        f"--ray-client-server-port={client_port}", "--include-dashboard=false",
    ]  # fmt: skip
    whole = {**environment(), **token}
    head = subprocess.Popen(command, env=whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    space = ("search", SMOKE, "--runs", tmp_path, "--trials", 1, "--address", f"127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not listens(port):
            time.sleep(0.2)
        joined = cactus_ray(*space, env=token)
        assert joined.returncode == 0, joined.stderr
        assert [t.status for t in read_records(tmp_path / "smoke").trials.values()] == ["completed"]
        stranger = cactus_ray(*space, "--name", "other", env={**token, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        assert stranger.returncode == 2
        assert f"127.0.0.1:{port}" in stranger.stderr
        assert head.poll() is None  # a cluster that we only joined goes on
    finally:
        head.terminate()
        head.wait(timeout=30)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
