"""The process beside the driver that talks to W&B.

It has the driver's environment, and so its keys, and the driver's disk, wherever Ray runs: keys never travel to other
nodes. Neither its death nor its silence reaches the search. The driver writes events into a pipe from a thread, and
reads from another what it prints; the end of the pipe, also where the driver was killed, lets the process finish.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cactus_ray.report.tracking import LOG, State, Tracker, shown
from cactus_ray.search.space import Space

CLOSE_SECONDS = 60.0
"""So long the end of a search waits at most for W&B to finish writing."""
BEGIN_SECONDS = 180.0
"""So long it waits before that for a process that has not said anything yet: a short search on a busy machine may be
over before W&B is imported, and would leave nothing."""
QUEUED = 10_000
"""Events that may wait for the process; with more of them it is taken to hang, and nothing more is sent."""
Say = Callable[[str], None]

_PROGRAM = """
import sys
root = sys.argv[1]
if root not in sys.path:
    sys.path.insert(0, root)
from cactus_ray.report.tracking_process import follow
follow()
"""


@contextlib.contextmanager
def tracking(space: Space, run: Path, say: Say) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A listener that passes every event of the study on to W&B, or None where tracking is off.

    ``say`` is given lines for the terminal, from any thread: the mode and why, the page, how to upload offline files.
    Events are sent without waiting; leaving the block waits at most ``CLOSE_SECONDS`` for W&B to finish writing.
    """
    if space.wandb.mode == "disabled":
        yield None
        return
    try:
        process = TrackingProcess(space.to_dict(), run, say)
    except (OSError, RuntimeError) as error:  # no memory, too many processes or threads, a full disk
        say(f"W&B: off: its process did not start ({error})")
        yield None
        return
    try:
        yield process.send
    finally:
        process.close(CLOSE_SECONDS)


class TrackingProcess:
    """The driver's end: starts the process, sends it events, and says what it answers. Raises OSError at the start."""

    def __init__(self, space: Mapping[str, Any], run: Path, say: Say) -> None:
        self.run, self.say = run, say
        self.state: State | None = None
        self.lost = self.closing = False
        self.begun = threading.Event()
        self.waiting: queue.Queue[bytes | None] = queue.Queue(QUEUED)
        (run / "wandb").mkdir(exist_ok=True)
        with (run / LOG).open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the driver, which ends this process when it is done.
            # -P: no file of the folder that the user works in takes the place of a module.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.threads = [threading.Thread(target=t, name="tracking", daemon=True) for t in (self._write, self._read)]
        self._put({"space": dict(space), "run": str(run.resolve())})
        for thread in self.threads:
            thread.start()

    def send(self, event: Mapping[str, Any]) -> None:
        """Pass one event on, without waiting; those that W&B does not show stay here."""
        if shown(event) and not self.lost:
            self._put(event)

    def close(self, seconds: float) -> None:
        """Let the process finish, for ``seconds`` at most once it has begun; then kill it. Says where everything is."""
        self.closing = True
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)
        try:
            if not self.lost:
                self.begun.wait(BEGIN_SECONDS)
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.say(f"W&B: not finished within {seconds:g} s, and ended; {self.run / LOG} may say why")
        finally:  # also where the user presses Ctrl-C once more
            self._end()

    def _end(self) -> None:
        finished = self.process.poll() == 0
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # W&B's own process is in its session, too
        self.process.wait()
        for thread in self.threads:
            thread.join(1.0)
        log = self.run / LOG
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
        if finished and self.state is not None:
            self.say(words(self.state, self.run))
        if (upload := sync_line(self.run)) and not (finished and self.state and self.state.mode == "offline"):
            self.say(f"W&B: upload what was kept offline with: {upload}")

    def _put(self, line: Mapping[str, Any]) -> None:
        try:
            self.waiting.put_nowait(json.dumps(line).encode() + b"\n")
        except queue.Full:
            self.lost = True
            self.say(f"W&B: its process hangs, and what follows is missing there; {self.run / LOG} may say why")

    def _write(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError), self.process.stdin as pipe:  # OSError: the process is no more
            while (line := self.waiting.get()) is not None:
                pipe.write(line)
                if self.waiting.empty():
                    pipe.flush()
        self.lost = True

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self.state = State(**json.loads(line))
                self.begun.set()
                self.say(words(self.state, self.run))
        self.begun.set()
        status = self.process.wait()  # one that died early is no zombie until the end of the search
        if not self.closing:
            self.say(f"W&B: its process died (status {status}), the search goes on; {self.run / LOG} may say why")


def words(state: State, run: Path) -> str:
    """One line for the terminal: the mode, why, and the page or how to upload."""
    why = f" ({state.why})" if state.why else ""
    if state.mode == "online":
        return f"W&B: online: {state.page}"
    if state.mode == "offline":
        upload = sync_line(run)
        before = f"; until then: {state.page}" if state.page else ""
        return f"W&B: offline{why}{before}" + (f"; upload with: {upload}" if upload else "")
    return f"W&B: off{why}"


def sync_line(run: Path) -> str | None:
    """The command that uploads the offline files of a run; None where there are none that were not uploaded yet."""
    files = (run / "wandb").glob("offline-run-*/*.wandb")
    if all(file.with_suffix(".wandb.synced").exists() for file in files):
        return None
    beside = Path(sys.executable).with_name("wandb")  # where the environment is not activated
    command = str(beside) if beside.exists() and shutil.which("wandb") is None else "wandb"
    return shlex.join([command, "sync", str(run / "wandb")])


# --- what runs in the process


def follow() -> None:
    """Follow the study that standard input tells, and print states as JSON lines. Never returns.

    Signals that are meant for the driver (Ctrl-C, the end of a batch job) are ignored: the end of the input is the end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which W&B's own process would inherit
    channel = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)  # what libraries print is no answer
    begin = json.loads(sys.stdin.buffer.readline())
    tracker = Tracker(begin["space"], begin["run"])
    told: State | None = None

    def tell() -> None:
        nonlocal told
        if tracker.state != told:
            told = tracker.state
            with contextlib.suppress(OSError):  # the driver is dead; what is here goes to W&B nevertheless
                channel.write(json.dumps(told.to_dict()) + "\n")
                channel.flush()

    tell()
    for line in sys.stdin.buffer:
        tracker.event(json.loads(line))
        tell()
    tracker.close()
    os._exit(0)  # a call that never came back, or what W&B does at an interpreter's end, must not hold it up
