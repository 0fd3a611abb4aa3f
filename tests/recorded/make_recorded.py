"""Makes the studies, Optuna storages and picks of this folder with the ``cactus_ray`` that is imported.

    python tests/recorded/make_recorded.py OUT [NAME ...]

Run it in the commit that is to be recorded; see README.md. No test runs it. A name is one of ``MAKERS``; without
names everything is made, in this order, because some start from others. All studies share one Ray, which is told of a
GPU that is not there: that is enough for who gets which part of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml

HERE = Path(__file__).resolve().parent
CLI = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]
FIRST_PORT = 46_001
TRAINER, VERIFIER = "ray::ImplicitFunc", "ray::Verifier"
"""Titles of the processes of Ray in which a trial trains and a verifier works."""
WORKERS = (TRAINER, VERIFIER)
LEFT_BY_A_DRIVER = (".driver.lock", ".scratch", "report.html")
"""Files of a run that are not recorded: a lock, a note that names a folder of this machine, and a page that can be
written again."""

MLP: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [8]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense", "int4", "prune:gs-l2:0.5+int8"],
    "train": {"epochs": 4, "batch_size": 32},
    "parameters": {
        "method": {"values": ["cactus", "ibp"]},
        "learning_rate": {"distribution": "log_uniform_values", "min": 0.002, "max": 0.02},
        "compression_set": {
            "when": {"method": ["cactus"]},
            "parameters": {"strategy": {"value": "single"}, "high": {"values": [0.5, 0.75]}},
        },
    },
    "verification": {"samples": 40, "attack_steps": 5},
    "wandb": {"mode": "disabled"},
}
CNN: dict[str, Any] = {
    **MLP,
    "model": {"name": "cnn_small", "width": 0.25},
    "threat": {"epsilon": 0.05},
    "levels": ["dense", "int8"],
    "train": {"epochs": 10, "batch_size": 16},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.002, "max": 0.01}},
}


# --- studies -------------------------------------------------------------------------------------------------------


def halving(out: Path) -> None:
    """Rungs, trials that wait, are promoted, or are stopped in the end; scores of every epoch; a constraint."""
    scheduler = {"name": "asha", "reduction": 2, "min_epochs": 1, "score": "epochs"}
    space = {
        **MLP,
        "constraints": [{"metric": "standard_accuracy@int4", "min": 0.6}],
        "search": {"trials": 8, "concurrency": 1, "fresh_samples": 0, "scheduler": scheduler},
    }
    search(out, space_file(out, "halving", space))


def waiting(out: Path) -> None:
    """The same scheduler, its driver killed while three trials wait with their states kept."""
    scheduler = {"name": "asha", "reduction": 3, "min_epochs": 1}
    asked = {"trials": 6, "concurrency": 1, "fresh_samples": 0, "sampler": "random", "scheduler": scheduler}
    run = out / "studies" / "waiting"
    with driver(out, space_file(out, "waiting", {**MLP, "search": asked})) as process:
        wait_until(process, lambda: len(with_event(run, "waiting")) >= 3)
        kill(process)


def replicates(out: Path) -> None:
    """After the search every network of the front is trained with a second seed and verified on fresh samples."""
    asked = {"trials": 3, "concurrency": 1, "sampler": "random", "seeds": 2, "fresh_samples": 20}
    search(out, space_file(out, "replicates", {**MLP, "search": asked}))


def killed(out: Path) -> None:
    """The training process of t0001 is killed in mid-training, the driver while t0002 is verified; then it goes on."""
    space = {
        **CNN,
        "search": {"trials": 3, "concurrency": 1, "sampler": "random", "fresh_samples": 0},
        "verification": {**MLP["verification"], "bound": "branch", "max_nodes": 20},
        "resources": {"state_seconds": 0.0, "cheap_samples": 10, "dear_samples": 1},
    }
    run = out / "studies" / "killed"
    with driver(out, space_file(out, "killed", space)) as process:
        wait_until(process, lambda: any((run / "in_flight").glob("t0001-*.safetensors")))
        (trainer,) = [pid for pid in descendants(os.getpid()) if title(pid).startswith(TRAINER)]
        os.kill(trainer, signal.SIGKILL)
        wait_until(process, lambda: any(e["trial"] == "t0002" for e in with_event(run, "verdicts")))
        kill(process)
    search(out, "--resume", "killed")


def out_of_memory(out: Path) -> None:
    """Two trials that do not fit a quarter of a GPU, and one whose loss is not finite; Ray is told of a GPU."""
    space = {
        **MLP,
        "model": {"factory": "crowded_model:crowded"},
        "levels": ["dense", "int8"],
        "parameters": {
            "method": {"value": "ibp"},
            "learning_rate": {"min": 0.002, "max": 0.02},
            "train.l1": {"values": [0.0, 1e38]},
        },
        "search": {
            "trials": 3, "sampler": "random", "fresh_samples": 0,
            "points": [{"train.l1": 0.0}, {"train.l1": 0.0}, {"train.l1": 1e38}],
        },
        "resources": {"gpus_per_worker": 1, "trials_per_gpu": 4, "cpus_per_worker": 0.5, "execution": "direct"},
    }  # fmt: skip
    search(out, space_file(out, "out_of_memory", space), "--trust-code")


def half_finished(out: Path) -> None:
    """t0001 is complete; the driver was killed while t0002 trained, its state kept; then a suggestion was queued."""
    space = {
        **CNN,
        "search": {"trials": 3, "concurrency": 1, "sampler": "random", "fresh_samples": 0},
        "resources": {"state_seconds": 0.0},
    }
    run = out / "studies" / "half_finished"
    with driver(out, space_file(out, "half_finished", space)) as process:
        wait_until(process, lambda: any((run / "in_flight").glob("t0002-[2-9]*.safetensors")))
        kill(process)
    cactus_ray(out, "suggest", "studies/half_finished", "--set", "learning_rate=0.004")


def warm(out: Path) -> None:
    """A study that was told the trials of ``halving`` before its first trial."""
    space = {
        **MLP,
        "parameters": {"method": {"value": "ibp"}, "learning_rate": MLP["parameters"]["learning_rate"]},
        "search": {"trials": 1, "concurrency": 1, "fresh_samples": 0},
    }
    search(out, space_file(out, "warm", space), "--from", "studies/halving")


# --- Optuna's storages ---------------------------------------------------------------------------------------------


def storages(out: Path) -> None:
    """The journal that ``dashboard`` makes of ``halving``, and a study in SQLite as a user of Optuna alone would
    write it: no names of objectives, one trial outside the space of ``halving``, one that failed."""
    from cactus_ray.search.optuna_file import write_storage
    from cactus_ray.search.space import load_space
    from cactus_ray.search.store import read_records

    run, folder = out / "studies" / "halving", out / "optuna"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_storage(load_space(run / "space.yaml"), read_records(run), folder / "halving.journal")
    rates = optuna.distributions.FloatDistribution(0.001, 0.1, log=True)
    methods = optuna.distributions.CategoricalDistribution(("ibp", "sabr"))
    storage = f"sqlite:///{folder / 'own.db'}"
    study = optuna.create_study(study_name="own", directions=["maximize", "maximize"], storage=storage)
    for rate, method, values in ((0.004, "ibp", (0.5, 0.7)), (0.015, "ibp", (0.6, 0.8)), (0.05, "ibp", (0.1, 0.2))):
        study.add_trial(
            optuna.create_trial(
                params={"learning_rate": rate, "method": method},
                distributions={"learning_rate": rates, "method": methods},
                values=values,
            )
        )
    study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL))
    for file in folder.glob("*.lock"):
        file.unlink()


# --- picks ---------------------------------------------------------------------------------------------------------

SABR: dict[str, Any] = {
    "threat": {"epsilon": 0.1},
    "train": {"epochs": 15, "batch_size": 32},
    "parameters": {"method": {"value": "sabr"}, "learning_rate": {"value": 0.005}},
    "search": {"trials": 1},
}
NETWORKS = {
    "network": {**CNN, **SABR},
    "mlp": {**MLP, **SABR, "model": {"name": "mlp", "hidden": [32]}},
}
"""Spaces of one configuration each, whose networks are certified. Branch and bound is quick on the small one."""
PICKS: dict[str, tuple[str, ...]] = {
    "family": ("network", "--level", "dense", "--family", "int8", "--samples", "24"),
    "w8a8": ("network", "--level", "w8a8", "--samples", "24"),
    "factored": ("network", "--level", "lr+sparse:0.3", "--samples", "24"),
    "branch": ("mlp", "--level", "prune:gu-l1:0.5+int8", "--bound", "branch", "--samples", "40"),
}
"""Of which network what is asked, by the folder that is written."""


def picks(out: Path) -> None:
    """Two network files, picks of four kinds from them, and one from the study ``killed``."""
    folder = out / "picks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, space in NETWORKS.items():
        cactus_ray(out, "train", space_file(out, name, space), "--out", f"picks/{name}.safetensors")
    for name, (network, *asked) in PICKS.items():
        cactus_ray(out, "pick", f"picks/{network}.safetensors", *asked, "--out", f"picks/{name}")
    study = shutil.copytree(out / "studies" / "killed", out / "killed")
    limits = ("--max-bytes", "20k", "--min-certified", "0.2", "--prefer", "bytes")
    cactus_ray(out, "pick", "killed", *limits, "--bound", "crown", "--samples", "24", "--out", "picks/crown")
    shutil.rmtree(study)
    for name in NETWORKS:  # the best epoch's network, and how often the test split was used
        for suffix in ("best.safetensors", "test_split_uses.jsonl"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


# --- running a driver ----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Workers of Ray must find the factory of ``out_of_memory``."""
    paths = filter(None, (str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled"}


def space_file(out: Path, name: str, space: dict[str, Any]) -> str:
    """The space as a file beside the studies, whose run of that name is deleted; its path relative to ``out``."""
    shutil.rmtree(out / "studies" / name, ignore_errors=True)
    (out / "spaces").mkdir(exist_ok=True)
    file = out / "spaces" / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, **space}, sort_keys=False))
    return str(file.relative_to(out))


def cactus_ray(out: Path, *arguments: str) -> None:
    """Run a verb in ``out``, so that paths in the records are relative."""
    print("cactus-ray", *arguments, flush=True)
    subprocess.run([*CLI, *arguments], cwd=out, env=environment(), check=True)


def search(out: Path, *arguments: str) -> None:
    cactus_ray(out, "search", *arguments, "--runs", "studies", "--address", "auto")


@contextlib.contextmanager
def driver(out: Path, space: str) -> Iterator[subprocess.Popen[bytes]]:
    """A search that runs beside this process."""
    print("cactus-ray search", space, flush=True)
    arguments = ["search", space, "--runs", "studies", "--address", "auto"]
    process = subprocess.Popen([*CLI, *arguments], cwd=out, env=environment())
    try:
        yield process
    finally:
        kill(process)


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """A Ray for all studies, below this process, with a token of its own; drivers find it by RAY_ADDRESS.

    With ports that are given, its start does not wait for agents to choose theirs, for which Ray is impatient.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ports = ("port", "metrics-export-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "ray-client-server-port")  # fmt: skip
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4", "--num-gpus=1"]
    start += [f"--{name}={FIRST_PORT + i}" for i, name in enumerate(ports)]
    start += ["--include-dashboard=false", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="recorded-", ignore_cleanup_errors=True) as folder:
        ray = subprocess.Popen([*start, f"--temp-dir={folder}"], env=environment(), stdout=subprocess.PIPE, text=True)
        try:
            assert ray.stdout is not None
            if not any("--block" in line for line in ray.stdout):  # what it prints last, once it is up
                raise SystemExit("Ray did not start")
            os.environ["RAY_ADDRESS"] = f"127.0.0.1:{FIRST_PORT}"
            yield
        finally:
            others = descendants(ray.pid)
            ray.terminate()
            ray.wait()
            ended(others)


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    while not reached():
        if process.poll() is not None:
            raise SystemExit(f"the driver ended (status {process.returncode}) before it could be killed")
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a driver that has not ended; its trainers and verifiers end with it."""
    workers = [pid for pid in descendants(os.getpid()) if title(pid).startswith(WORKERS)]
    process.kill()
    process.wait()
    ended(workers)


def ended(pids: list[int]) -> None:
    """Wait until processes have ended; those that are still there after two minutes are killed."""
    deadline = time.monotonic() + 120
    while (left := [pid for pid in pids if title(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def title(pid: int) -> str:
    """The command line of a live process; empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def with_event(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in the records of a run; a line that is half written is none."""
    file, found = run / "trials.jsonl", []
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            found += [event] if event["event"] == kind else []
    return found


MAKERS: dict[str, Callable[[Path], None]] = {
    "halving": halving, "waiting": waiting, "replicates": replicates, "killed": killed,
    "out_of_memory": out_of_memory, "half_finished": half_finished, "warm": warm, "storages": storages, "picks": picks,
}  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with own_ray():
        for name in sys.argv[2:] or MAKERS:
            MAKERS[name](out)
    shutil.rmtree(out / "spaces", ignore_errors=True)
    for study in (out / "studies").iterdir():
        for name in LEFT_BY_A_DRIVER:
            (study / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
