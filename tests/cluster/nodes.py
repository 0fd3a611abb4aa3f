"""A head and workers as Ray nodes of one machine, each with a temporary folder of its own; workers may lack a folder.

Linux only: a worker that lacks a folder has a mount namespace of its own, in which that folder is empty.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos import below

RAY = str(Path(sys.executable).with_name("ray"))
COMMON = (
    "--block", "--node-ip-address=127.0.0.1", "--num-gpus=0", "--object-store-memory=80000000",
    "--dashboard-agent-listen-port=0", "--disable-usage-stats",
)  # fmt: skip
STARTS = 5
"""So often a node may fail to start: Ray gives its processes 15 and 30 seconds, too few on a busy machine."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """A cluster that is up. ``environment``: of whoever wants to join it. ``roots``: the head's process, then those
    of the workers; below each are all others of its node. ``folder`` holds the temporary folders of all nodes."""

    address: str
    environment: dict[str, str]
    roots: tuple[int, ...]
    folder: Path


def can_hide_folders() -> bool:
    """Whether a process may have mounts of its own here."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def nodes(head: int, workers: tuple[int, ...], hidden: Path | None = None) -> Iterator[Nodes]:
    """A head and workers with so many CPUs; workers find ``hidden`` empty. Ends all that it started."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": path,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))  # sockets lie in it, whose paths must be short
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        options = ["--head", "--port=0", "--include-dashboard=false", f"--num-cpus={head}"]
        roots = [_start(stack, base / "h", options, environment)]
        (note,) = base.glob("h*/ray_current_cluster")
        address = note.read_text().strip()
        for number, cpus in enumerate(workers):
            options = [f"--address={address}", f"--num-cpus={cpus}"]
            roots.append(_start(stack, base / f"w{number}-", options, environment, hidden))
        yield Nodes(address, environment, tuple(roots), base)


def _start(
    stack: contextlib.ExitStack, folder: Path, options: list[str], environment: Mapping[str, str],
    hidden: Path | None = None,
) -> int:  # fmt: skip
    """Start a node, again if Ray gave it up; its process."""
    output = ""
    for attempt in range(STARTS):
        own = folder.with_name(f"{folder.name}{attempt}")
        own.mkdir()
        command = [RAY, "start", *options, f"--temp-dir={own}", *COMMON]
        if hidden is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(hidden), *command]
        log = own / "output"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file, start_new_session=True)
        stack.callback(_stop, process)
        while process.poll() is None and "Ray runtime started" not in (output := log.read_text()):
            if "unexpected system state" in _raylet(own):
                break
            time.sleep(0.1)
        if "Ray runtime started" in output:
            return process.pid
        _stop(process)
        shutil.rmtree(own)
    raise AssertionError(f"a node did not start {STARTS} times: {output[-3000:]}")


def _raylet(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in folder.glob("session_2*/logs/raylet.out"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a node with all its processes: asked to end, it would drain for half a minute."""
    for pid in (*below(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
