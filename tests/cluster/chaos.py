"""Kills the processes of a search at random moments, and says what is left of it. Linux only (``/proc``)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.models.network import pack
from cactus_ray.training.loop import train

PR_SET_CHILD_SUBREAPER = 36
TRAINER, VERIFIER = "ray::ImplicitFunc", "ray::Verifier"
"""Titles of the processes of Ray in which trials train (directly) and verifiers work."""


_others: set[int] = set()
"""Processes below this one that were there before; other tests may have left them (multiprocessing's trackers)."""


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Inside the block, processes whose parent died become children of this one, so that none gets out of sight."""
    _others.clear()
    _others.update(below(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def below(root: int) -> dict[int, str]:
    """Command lines of the live processes below ``root``, by id."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    ring = {root}
    while ring:
        ring = {pid for pid, parent in parents.items() if parent in ring}
        for pid in ring:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


@dataclass
class Search:
    """A search in a process of its own, started again whenever it was killed. ``seconds``: that its drivers lived."""

    command: list[str]
    log: Path
    seconds: float = 0.0
    begun: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    kills: list[str] = field(default_factory=list)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        self.begun = time.monotonic()

    def wait(self, seconds: float) -> int:
        """The exit status of the driver, which is awaited for so long."""
        assert self.process is not None
        status = self.process.wait(timeout=seconds)
        self.seconds += time.monotonic() - self.begun
        self.process = None
        return status

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill_driver(self, number: int) -> int:
        """End the driver; its exit status. Ctrl-C is pressed again after a while, as people do."""
        assert self.process is not None
        self.kills.append(signal.Signals(number).name)
        for _ in range(6):
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.wait(30)
        raise AssertionError(f"the driver outlived six {self.kills[-1]}")

    def parts(self, title: str) -> list[int]:
        """Processes below the driver that bear the title."""
        assert self.process is not None
        return sorted(pid for pid, line in below(self.process.pid).items() if line.startswith(title))

    def kill_part(self, title: str) -> None:
        """SIGKILL the first process below the driver that bears the title; it may have ended meanwhile."""
        for pid in self.parts(title)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills.append(title)


def wait_for(reached: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes to that within so many seconds."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def leftovers(seconds: float = 180.0) -> dict[int, str]:
    """Processes below this one, of those that came after ``adopting``, that are still there after so many seconds."""

    def now() -> dict[int, str]:
        _bury()
        return {pid: line for pid, line in below(os.getpid()).items() if pid not in _others}

    wait_for(lambda: not now(), seconds)
    return now()


def _bury() -> None:
    """Bury the adopted, as init would: Ray's workers take a raylet that is a zombie for alive."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in _others:
            with contextlib.suppress(OSError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) == os.getpid():
                    os.waitpid(int(entry.name), os.WNOHANG)


def plain_network(config: dict[str, Any]) -> str:
    """Digest of the network that undisturbed training gives."""
    run = parse(RunConfig, config)
    torch.set_num_threads(1)
    found = train(run, load(run.data, ("train", "selection")), report=lambda epoch: True).network
    return hashlib.sha256(pack(found)).hexdigest()
