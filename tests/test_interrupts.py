"""Ctrl-C and SIGTERM: what the first one, its echo and the second one do, in this process and in one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cactus_ray import interrupts

BOTH = pytest.mark.parametrize("number", interrupts.SIGNALS, ids=lambda number: signal.Signals(number).name)


class EndedError(BaseException):  # as nothing that handles errors may see it
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def _nothing_heard_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process begins, whatever commands an earlier test ran in this one."""
    monkeypatch.setattr(interrupts, "_state", interrupts._State())
    before = {number: signal.signal(number, signal.default_int_handler) for number in interrupts.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Handlers as ``main`` installs them, with a clock that stands still, and an end that can be caught."""

    def end() -> None:
        raise EndedError

    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupts, "_end", end)
    with interrupts.handled():
        yield now


@BOTH
def test_the_first_raises_its_echo_does_nothing_and_the_second_ends(clock: list[float], number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    clock[0] += interrupts.ECHO_SECONDS / 2
    signal.raise_signal(number)
    clock[0] += interrupts.ECHO_SECONDS
    with pytest.raises(EndedError):
        signal.raise_signal(number)


@BOTH
def test_what_must_not_be_torn_is_done_first(clock: list[float], number: signal.Signals) -> None:
    done = []

    def start() -> None:
        with interrupts.deferred():
            signal.raise_signal(number)
            done.append("all of it")
            raise OSError("which comes of the signal")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["all of it"]


def test_a_second_one_does_not_wait(clock: list[float]) -> None:
    def start() -> None:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            clock[0] += 1.0
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(EndedError):
        start()


@pytest.mark.filterwarnings("ignore")
def test_leaving_as_ray_does_is_an_interrupt(clock: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        sys.exit(signal.SIGTERM)
    clock[0] += 1.0
    with pytest.raises(EndedError):  # it was the first one
        signal.raise_signal(signal.SIGTERM)


def test_errors_and_blocks_without_a_signal_pass(clock: list[float]) -> None:
    with interrupts.deferred():
        pass
    with pytest.raises(ValueError, match="x"), interrupts.deferred():
        raise ValueError("x")


def test_who_asked_is_told_once_and_a_repetition_is_no_signal(clock: list[float]) -> None:
    told: list[str] = []
    with interrupts.handled(lambda: told.append("told")):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        for _ in range(3):
            clock[0] += 20.0
            with pytest.raises(KeyboardInterrupt):
                _repeated_by_a_thread()
    assert told == ["told"]


def _repeated_by_a_thread() -> None:
    thread = threading.Thread(target=interrupts.repeat)
    thread.start()
    while True:  # the signal comes between two steps of the main thread
        time.sleep(0.001)


def test_handlers_come_back_and_a_later_block_counts_anew() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    for _ in range(2):  # with the end of the process in place: a second count would end these tests
        with pytest.raises(KeyboardInterrupt), interrupts.handled():
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_another_thread_changes_nothing() -> None:
    found = []

    def work() -> None:
        with interrupts.handled(), interrupts.deferred():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


PROGRAM = """
import sys, time
from pathlib import Path
from cactus_ray import interrupts
interrupts.install()
interrupts.say_last(lambda: "go on with: this")
try:
    Path(sys.argv[1], "ready").touch()
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    Path(sys.argv[1], "first").touch()
    while True:
        time.sleep(0.01)
"""


@BOTH
def test_a_process_ends_at_the_second_one_with_its_last_words(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    _wait_for(tmp_path / "first", process)
    while process.poll() is None:  # until one comes that is no echo
        process.send_signal(number)
        time.sleep(0.05)
    assert process.communicate()[1] == "go on with: this\n"
    assert process.returncode == 130


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
