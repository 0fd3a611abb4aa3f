"""suggest, explain, dashboard, train --trial and --dry-run, through the command line and without Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from cactus_ray import cli
from cactus_ray.commands import estimate, search
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.errors import UserError
from cactus_ray.models import create
from cactus_ray.models.network import pack
from cactus_ray.search.chunks import ChunkResult, LevelResult
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study
from cactus_ray.training import bench
from cactus_ray.training.loop import train
from cactus_ray.training.passes import estimated_units

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 128},
    "model": {"name": "mlp", "hidden": [16]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense", "int8"],
    "train": {"epochs": 2, "batch_size": 64},
    "parameters": {"method": {"values": ["cactus", "ibp"]}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 3, "sampler": "random"},
    "verification": {"samples": 20, "attack_steps": 5},
}
REFERENCE = {"certified_accuracy": 0.0, "bytes": 1e5, "standard_accuracy": 0.0}


@pytest.fixture(scope="module")
def space() -> Space:
    return parse_space(SPACE, "tiny.yaml")


@pytest.fixture(scope="module")
def run(space: Space, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first trial was really trained."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    study = Study(space, RunStore(folder), Records(), [0, 1])
    (folder / "space.yaml").write_text(yaml.safe_dump(space.to_dict(), sort_keys=False))
    study.begin({"name": "tiny", "seed": 0, "init": None}, REFERENCE)
    start = study.next_trial()
    assert start is not None
    trained = train(start.config, load(space.data, ("train", "selection")), report=lambda epoch: True)
    networks = {"last": pack(trained.last), "best": pack(trained.best)}
    for chunk in study.trained(start.id, networks, "last", 2, 1.0):
        rows: list[list[Any]] = [[i, 0, "CERTIFIED", True, 0.5, "ibp", 0.01] for i in chunk.indices]
        measures = {"bytes": 1000, "ideal_bits": 8000, "macs": 500}
        levels = {level: LevelResult([*rows], measures, 0.1) for level in chunk.levels}
        study.verified(ChunkResult(chunk, levels, {"ibp": 0.2}))
    return folder


def cactus_ray(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.run([str(a) for a in arguments])
    found = capsys.readouterr()
    return status, found.out, " ".join(found.err.split())


def test_a_trial_is_repeated_alone_with_the_same_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "again.safetensors"
    status, out, _ = cactus_ray(capsys, "train", "--trial", run / "t0001", "--out", to, "--json")
    assert status == 0
    assert json.loads(out)["same_network"] is True
    assert to.read_bytes() == (run / "checkpoints" / "t0001.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--trial", "{run}/t0009"], "expected RUN/TRIAL with a trial of"),
        (["--trial", "{run}/t0001", "--set", "learning_rate=0.1"], "nothing beside --trial"),
        ([], "got neither; expected a search space or --trial"),
        (["--trial", "{run}/t0001", "--init", "{run}/checkpoints/t0001.safetensors"], "expected no --init"),
    ],
)
def test_what_cannot_be_repeated_is_refused(
    arguments: list[str], hint: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(run=run) for a in arguments]
    status, _, err = cactus_ray(capsys, "train", *filled, "--out", tmp_path / "x.safetensors")
    assert status == 2
    assert hint in err


def test_a_trial_is_trained_where_its_study_trained_unless_said_otherwise(
    space: Space, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tmp_path / "gpus"
    gpus.mkdir()
    (gpus / "trials.jsonl").write_bytes((run / "trials.jsonl").read_bytes())
    plain = {**space.to_dict(), "resources": {**space.to_dict()["resources"], "gpus_per_worker": 0.5}}
    (gpus / "space.yaml").write_text(yaml.safe_dump(plain))
    single = importlib.import_module("cactus_ray.commands.single")
    inner, devices = single.run_loop, []

    def watched(*arguments: Any, device: str, **rest: Any) -> Any:
        devices.append(device)
        return inner(*arguments, **rest)  # here, whatever was asked for

    monkeypatch.setattr(single, "run_loop", watched)

    def pretend(cuda: bool) -> None:
        seen = SimpleNamespace(is_available=lambda: cuda)
        fake = SimpleNamespace(cuda=seen, set_num_threads=torch.set_num_threads)
        monkeypatch.setattr(single, "torch", fake)

    pretend(cuda=True)
    for folder, more in ((run, []), (gpus, []), (gpus, ["--device", "cpu"]), (run, ["--device", "cuda"])):
        to = tmp_path / "again.safetensors"
        status, out, err = cactus_ray(capsys, "train", "--trial", folder / "t0001", "--out", to, "--json", *more)
        assert status == 0, err
        assert json.loads(out)["device"] == devices[-1]
    assert devices == ["cpu", "cuda", "cpu", "cuda"]
    pretend(cuda=False)
    for folder, more, hint in (
        (gpus, [], "--device: got 'cuda'; expected cpu: the study trained on GPUs, and torch sees no CUDA device here"),
        (run, ["--device", "cuda"], "--device: got 'cuda'; expected cpu: torch sees no CUDA device"),
        (run, ["--device", "tpu"], "--device: got 'tpu'; expected cpu or cuda"),
    ):
        out_file = tmp_path / "x.safetensors"
        status, _, err = cactus_ray(capsys, "train", "--trial", folder / "t0001", "--out", out_file, *more)
        assert status == 2
        assert hint in err
        assert not out_file.exists()


def test_suggestions_are_queued_and_bad_ones_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cactus_ray(capsys, "suggest", run, "--set", "learning_rate=0.004", "--set", "method=ibp", "--json")
    assert (status, json.loads(out)["values"]) == (0, {"learning_rate": 0.004, "method": "ibp"})
    lines = (run / "suggestions.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["values"] == {"learning_rate": 0.004, "method": "ibp"}
    for wrong, hint in (
        ("learning_rate=7", "--set learning_rate: got 7; expected a value that learning_rate can take"),
        ("train.epochs=9", "--set train.epochs: got 9; expected 2, which is fixed in this study"),
        ("depth=3", "expected a searched parameter: method, learning_rate"),
    ):
        status, _, err = cactus_ray(capsys, "suggest", run, "--set", wrong)
        assert status == 2
        assert hint in err
    assert cactus_ray(capsys, "suggest", run)[0] == 2
    assert len((run / "suggestions.jsonl").read_text().splitlines()) == len(lines)


def test_explain_says_what_became_of_a_trial(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cactus_ray(capsys, "explain", run, "t0001")
    assert status == 0
    assert "t0001: complete" in out
    assert "dense: on the front" in out
    assert cactus_ray(capsys, "explain", run, "t0404")[0] == 2


def test_explain_shows_what_was_compared_at_a_rung(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search_ = {"trials": 9, "sampler": "random", "scheduler": {"name": "asha", "promote": False}}
    space = parse_space({**SPACE, "train": {"epochs": 9}, "search": search_}, "tiny.yaml")
    study = Study(space, RunStore(tmp_path), Records(), [0, 1])
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space.to_dict(), sort_keys=False))
    study.begin({"name": "tiny", "seed": 0, "init": None}, REFERENCE)
    for quality in (0.75, 0.5, 0.25):
        start = study.next_trial()
        assert start is not None
        metrics = dict.fromkeys(study.rungs.halving.rules.goals, quality)
        for epoch in range(1, 9):
            if not study.epoch(start.id, epoch, 9, metrics):
                study.stopped(start.id, seconds=1.0)
                break
    stopped = [name for name, trial in read_records(tmp_path).trials.items() if trial.status == "stopped"]
    assert stopped
    status, out, _ = cactus_ray(capsys, "explain", tmp_path, stopped[0])
    assert status == 0
    text = " ".join(out.split())
    assert "when it came" in text
    assert "standard_accuracy@dense more 0.25 0.75" in text or "standard_accuracy@dense more 0.5 0.75" in text
    assert f"dominates {stopped[0]} yes" in text
    found = json.loads(cactus_ray(capsys, "explain", tmp_path, stopped[0], "--json")[1])
    assert found["rung"]["better"][0]["trial"] == "t0001"
    assert found["rung"]["better"][0]["values"]["standard_accuracy@dense"] == 0.75


def test_the_dashboard_is_optional_and_gets_a_copy(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shown = importlib.import_module, []

    def missing(name: str) -> Any:
        if name == "optuna_dashboard":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    status, _, err = cactus_ray(capsys, "dashboard", run)
    assert status == 2
    assert "pip install 'cactus-ray[dashboard]'" in err

    def serve(storage: Any, host: str, port: int) -> None:
        shown.append((storage.get_all_studies()[0].study_name, host, port))

    fake = SimpleNamespace(run_server=serve)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake if name == "optuna_dashboard" else real(name))
    status, _, _ = cactus_ray(capsys, "dashboard", run, "--port", "8123")
    assert (status, shown) == (0, [("tiny", "localhost", 8123)])


@pytest.mark.skipif(importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed")
def test_the_dashboard_serves_a_run_on_this_machine_alone(
    run: Path, space: Space, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
        taken.listen()
        status, _, err = cactus_ray(capsys, "dashboard", run, "--port", port)
        assert (status, f"--port {port}: Address already in use" in err) == (2, True)
    command = [sys.executable, "-c", "from cactus_ray.cli import main; main()", "dashboard", str(run)]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"http://localhost:{port}" in server.stdout.readline()
        answer = fetched(f"http://localhost:{port}/api/studies", seconds=60)
        (summary,) = json.loads(answer)["study_summaries"]
        assert (summary["study_name"], summary["directions"]) == ("tiny", [o.goal for o in space.objectives])
        study = json.loads(fetched(f"http://localhost:{port}/api/studies/{summary['study_id']}?after=0"))
        assert [trial["state"] for trial in study["trials"]] == ["Complete"]
        assert study["objective_names"] == [o.metric for o in space.objectives]
        assert "<title>Optuna Dashboard" in fetched(f"http://localhost:{port}/dashboard")
        for _ in range(6):  # in the middle of an answer, Python's server takes Ctrl-C for a fault of that answer alone
            server.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert server.wait(10) == 0
                break
    finally:
        server.kill()
        server.communicate()
    assert server.returncode == 0


def fetched(url: str, seconds: float = 10.0) -> str:
    """What a server answers, which may still be starting."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as answer:
                return str(answer.read().decode())
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_run_is_resumed_by_its_name_with_its_own_space(
    run: Path, space: Space, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(search, "dry_run", lambda console, space, options, as_json: asked.append((space, options.run)))
    arguments = ["search", "--resume", "tiny", "--runs", run.parent, "--trials", "4", "--dry-run"]
    assert cactus_ray(capsys, *arguments)[0] == 0
    ((found, folder),) = asked
    assert folder == run
    assert found.search.trials == 4
    assert (found.parameters, found.base["train"]) == (space.parameters, space.base["train"])
    for wrong, hint in (
        (["--resume", "other", "--runs", run.parent], "--resume: got 'other'; expected a run in"),
        (["--resume", "tiny", "--runs", run.parent, "--from-scratch"], "nothing beside --resume"),
        ([run / "space.yaml", "--resume", "tiny"], "got both"),
        ([], "got neither"),
    ):
        status, _, err = cactus_ray(capsys, "search", *wrong)
        assert status == 2
        assert hint in err


# --- what it would cost --------------------------------------------------------------------------------------------


def test_a_dry_run_estimates_every_method_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "DRAWS", 1)
    monkeypatch.setattr(estimate, "TURNS", 2)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    status, out, err = cactus_ray(capsys, "search", file, "--runs", tmp_path / "runs", "--dry-run", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["training"]) == {"cactus", "ibp"}
    for spread in found["training"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert found["study"]["low"] <= found["study"]["median"] <= found["study"]["high"]
    assert found["verification"] > 0
    assert found["trials"] == 3
    assert 5e6 < found["disk_bytes"] < 6e6
    assert found["upper_end"] is False
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"parameters": {"method": {"values": ["ibp", "taps"]}, "tail_layers": {"values": [2, 9]}}},
            "tail_layers: got 9; expected one of 1, 2",
        ),
        (
            {"model": {"name": "resnet18", "width": 0.02}, "parameters": {"method": {"values": ["ibp", "staps"]}}},
            "tail_layers: got 2; expected one of 1, 3, 6",
        ),
        (
            {"parameters": {"model.batch_norm": {"values": [False, True]},
                            "compression_set.member_fraction": {"values": [0.01, 0.5]}}},
            "compression_set.member_fraction: got 0.01; expected at least 2 images",
        ),
        (
            {"threat": {"epsilon": 0.02, "domain": [0.2, 0.8]}},
            "threat.domain: got [0.2, 0.8]; expected an interval that holds the pixels of digits, 0 to 1",
        ),
        (
            {"parameters": {"train.crop_padding": {"values": [1, 8]}}},
            "train.crop_padding: got 8; expected less than the 8 pixels of a side",
        ),
    ],
)  # fmt: skip
def test_what_no_trial_could_train_is_refused_before_launch(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "never.yaml"
    file.write_text(yaml.safe_dump({**SPACE, **change}))
    status, _, err = cactus_ray(capsys, "search", file, "--runs", tmp_path / "runs")
    assert (status, words in " ".join(err.split())) == (2, True), err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_that_rungs_do_not_apply_constraints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "estimate", lambda *arguments: None)
    monkeypatch.setattr(search, "print_estimate", lambda *arguments, as_json: None)
    for scheduler, said in ("asha", True), ("none", False):
        file = tmp_path / f"{scheduler}.yaml"
        constraints = [{"metric": "standard_accuracy@int8", "min": 0.9}]
        asked = {**SPACE, "constraints": constraints, "search": {"trials": 3, "scheduler": {"name": scheduler}}}
        file.write_text(yaml.safe_dump(asked))
        status, out, err = cactus_ray(capsys, "search", file, "--runs", tmp_path / "runs", "--dry-run")
        assert status == 0, err
        assert ("rungs compare trials without them" in out) is said


def test_a_dry_run_of_an_own_network_with_halving_says_that_it_counts_whole_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "DRAWS", 1)
    monkeypatch.setattr(estimate, "TURNS", 1)
    monkeypatch.setattr(estimate, "STEPS", 1)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = {
        **SPACE, "model": {"factory": "own_network:residual"}, "parameters": {"method": {"values": ["ibp"]}},
        "search": {**SPACE["search"], "scheduler": {"name": "asha"}},
    }  # fmt: skip
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(own))
    arguments = ["search", file, "--runs", tmp_path / "runs", "--dry-run"]
    status, _, err = cactus_ray(capsys, *arguments)
    assert status == 2
    assert "--trust-code" in err
    status, out, err = cactus_ray(capsys, *arguments, "--trust-code")
    assert status == 0, err
    assert "every trial is counted as trained to its last epoch" in out
    status, out, err = cactus_ray(capsys, *arguments, "--trust-code", "--json")
    assert status == 0, err
    assert json.loads(out)["upper_end"] is True


def test_a_trial_is_priced_by_the_shares_of_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a step's seconds were its passes."""
    space = parse_space({**SPACE, "parameters": {}}, "tiny.yaml")
    data = load(space.data, ("train", "selection"))
    train = {"epochs": 10, "batch_size": 64, "warmup": 0.1, "ramp": 0.4}
    shared = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1}, "train": train}

    def passes(call: Any, *rest: Any, **options: Any) -> float:
        mine = getattr(call, "__self__", None)
        return 1.0 if mine is None else estimated_units(mine.run.config, mine.run.graph, mine.run.params, mine.phase)

    def seconds(**values: Any) -> float:
        return estimate._training([parse(RunConfig, {**shared, **values})], data, space, False).median

    monkeypatch.setattr(bench, "_timed", passes)
    monkeypatch.setattr(estimate, "proxy_accuracies", lambda *rest: None)
    steps = 2 * 10
    assert seconds(method="sabr") == pytest.approx(steps * (0.1 * 3 + 0.9 * 11), abs=0.1)
    assert seconds(method="staps", latent_steps=10) == pytest.approx(steps * (0.1 * 3 + 0.4 * 11 + 0.5 * 31), abs=0.1)
    staged = seconds(method="c_sam", stage_shares=[5, 3, 2])
    assert staged == pytest.approx(steps * (0.05 * 3 + 0.45 * 11 + 0.3 * 26 + 0.2 * 11), abs=0.1)


def test_a_study_that_would_fill_the_disk_is_refused_with_the_numbers(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(space.data, ("train", "selection"))
    untrained = create(space.configuration({"method": "ibp"}, 1), data.input_shape, data.classes, data.class_names)
    estimate.refuse_full_disk(space, data, untrained, tmp_path / "a" / "b")
    monkeypatch.setattr(estimate, "free_bytes", lambda run: 1_000_000)
    with pytest.raises(UserError, match=r"3 trials writes about 5\.\d+ MB, and 1 MB are free"):
        estimate.refuse_full_disk(space, data, untrained, tmp_path)


def test_the_states_of_all_trials_that_may_wait_are_counted(space: Space) -> None:
    data = load(space.data, ("train", "selection"))
    untrained = create(space.configuration({"method": "ibp"}, 1), data.input_shape, data.classes, data.class_names)
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "stopping": {"name": "asha", "promote": False},
        "waiting": {"name": "asha"},
    }
    found = {
        name: estimate.disk_bytes(
            replace(space, search=replace(space.search, scheduler=SchedulerSettings(**asked))), data, untrained
        )
        for name, asked in settings.items()
    }
    assert found["none"] == found["stopping"]
    assert found["waiting"] - found["stopping"] == space.search.trials * 5 * len(pack(untrained))


def test_a_broken_space_of_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "broken"
    run.mkdir()
    (run / "space.yaml").write_text("a: [")
    (run / "trials.jsonl").write_text("")
    for verb in (["report", run], ["explain", run, "t0000"]):
        status, _, err = cactus_ray(capsys, *verb)
        assert (status, "space.yaml" in err) == (2, True), err
