"""Where the seconds of a verification go: stages report theirs to whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

STAGES = ("clean", "attack", "ibp", "crown", "alpha", "branch")
_STAGE_OF = {
    "known_points": "attack", "nearest_points": "attack", "quick_attack": "attack", "full_attack": "attack",
    "hunt": "attack", "interval_bounds": "ibp", "linear_bounds": "crown", "alpha_bounds": "alpha",
    "branch_and_bound": "branch",
}  # fmt: skip
_LISTENER: ContextVar[dict[str, float] | None] = ContextVar("_LISTENER", default=None)


@contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """Seconds of wall-clock time by stage, of everything that is verified inside the block."""
    seconds: dict[str, float] = {}
    token = _LISTENER.set(seconds)
    try:
        yield seconds
    finally:
        _LISTENER.reset(token)


def book(function: str, seconds: float) -> None:
    """Tell the innermost listener, if there is one, that the stage of that function took so long."""
    listener = _LISTENER.get()
    if listener is not None:
        stage = _STAGE_OF.get(function, function)
        listener[stage] = listener.get(stage, 0.0) + seconds
