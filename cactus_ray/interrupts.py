"""Ctrl-C and SIGTERM of a command: the first one raises KeyboardInterrupt, the second one ends the process at once."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

EXIT_STATUS = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 0.5
"""A signal that follows the first one so closely is that one again: a terminal sends Ctrl-C to a script and to what the
script runs, and the script passes it on."""


class _State:
    """What this process has heard, and who is to be told.

    ``first``: when the first signal came; ``due``: it is to be raised where ``deferring`` ends; ``repeated``: the next
    signal is this process's own.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.deferring = 0
        self.due = False
        self.repeated = False
        self.listeners: list[Callable[[], None]] = []
        self.last_words: Callable[[], str] = lambda: "interrupted"


_state = _State()


def install() -> None:
    """Handle SIGINT and SIGTERM from here on. Only the main thread may."""
    for number in SIGNALS:
        signal.signal(number, _handle)


@contextlib.contextmanager
def handled(told: Callable[[], None] | None = None) -> Iterator[None]:
    """Handle both signals inside the block, whatever handled them before; ``told`` is called at the first one.

    Does nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if any(handler is not _handle for handler in before.values()):  # nobody has counted up to here
        _state.first, _state.due, _state.repeated = None, False, False
    install()
    if told is not None:
        _state.listeners.append(told)
    try:
        yield
    finally:
        if told is not None:
            _state.listeners.remove(told)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the first signal wait for the end of the block, which must not be torn in the middle.

    A SystemExit that leaves the block was a signal, too: Ray handles SIGTERM itself while it starts, by leaving. Does
    nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.deferring += 1
    try:
        yield
    except SystemExit:
        _note()
        _state.due = True
    except Exception:
        if not _state.due:  # else it may well come of the signal, which has reached others, too
            raise
    finally:
        _state.deferring -= 1
    if _state.due and not _state.deferring:
        _state.due = False
        raise KeyboardInterrupt


def repeat() -> None:
    """Raise KeyboardInterrupt in the main thread, from another one. It does not count as a signal."""
    _state.repeated = True
    _thread.interrupt_main(signal.SIGTERM)


def say_last(words: Callable[[], str]) -> None:
    """Set the words with which an interrupted command ends."""
    _state.last_words = words


def last_words() -> str:
    """The words with which the interrupted command ends."""
    return _state.last_words()


def _handle(number: int, frame: object) -> None:
    if _state.repeated:
        _state.repeated = False
        raise KeyboardInterrupt
    if _state.first is not None:
        if time.monotonic() - _state.first > ECHO_SECONDS:
            _end()
        return
    _note()
    if _state.deferring:
        _state.due = True
    else:
        raise KeyboardInterrupt


def _note() -> None:
    if _state.first is None:
        _state.first = time.monotonic()
        for told in list(_state.listeners):
            told()


def _end() -> None:
    """End the process without another step. Ray's own processes die with it: they are told to by the kernel."""
    try:
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # a live display hides the cursor
        os.write(2, f"{last_words()}\n".encode())
    finally:
        os._exit(EXIT_STATUS)
