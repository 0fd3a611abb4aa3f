"""The one Ray actor that talks to W&B, so that a slow network never holds up a search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cactus_ray.report.tracking import Tracker
from cactus_ray.search.space import Space

CLOSE_SECONDS = 60.0


@contextlib.contextmanager
def tracking(space: Space, run: Path) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A listener that sends every event of the study to the tracker, or None where tracking is off. Ray must be up.

    Events are sent without waiting; leaving the block waits at most ``CLOSE_SECONDS`` for W&B to finish writing.
    """
    import ray

    if space.wandb.mode == "disabled":
        yield None
        return
    actor = ray.remote(Tracker).options(num_cpus=0).remote(space.to_dict(), str(run.resolve()))

    def listener(event: dict[str, Any]) -> None:
        actor.event.remote(event)

    try:
        yield listener
    finally:
        ray.wait([actor.close.remote()], timeout=CLOSE_SECONDS)
        ray.kill(actor)
