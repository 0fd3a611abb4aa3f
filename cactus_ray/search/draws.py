"""New trials of a search: what the sampler proposes, as the first event of a trial and the configuration to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cactus_ray.config import RunConfig
from cactus_ray.errors import UserError
from cactus_ray.search.points import Suggested
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space


@dataclass(frozen=True, slots=True)
class TrialStart:
    """A trial that shall be trained.

    ``asked``: epochs after which it waits for an answer; ``scored``: epochs after which the proxies are measured.
    ``state``: after ``epoch`` epochs, from which it goes on; ``attempt``: counts the processes that trained it.
    """

    id: str
    number: int
    config: RunConfig
    asked: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    epoch: int = 0
    state: bytes | None = None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """A configuration that was drawn. ``event``: its first one; ``error``: why it cannot be built, if so."""

    id: str
    number: int
    event: dict[str, Any]
    config: RunConfig | None = None
    error: str = ""


class Draws:
    """Asks the sampler, and first those configurations that were queued into the run while it ran."""

    def __init__(
        self, space: Space, run: Path, sampler: OptunaSampler, epoch_cost: Callable[[RunConfig], float]
    ) -> None:
        self.space, self.sampler, self.epoch_cost = space, sampler, epoch_cost
        self.suggested = Suggested(run, space)

    def next(self) -> Drawn | None:
        """The next configuration; None if there is none any more."""
        self.sampler.enqueue(self.suggested.new())
        suggestion = self.sampler.ask()
        if suggestion is None:
            return None
        trial, number = f"t{suggestion.number:04d}", suggestion.number
        started = {"event": "started", "trial": trial, "number": number, "parameters": suggestion.values}
        started |= {"origin": suggestion.origin} | ({"note": suggestion.note} if suggestion.note else {})
        try:
            config = self.space.configuration(suggestion.values, number)
            cost = self.epoch_cost(config)
        except UserError as error:
            return Drawn(trial, number, {**started, "config": {}, "config_hash": "", "seed": 0}, error=str(error))
        plain = {"config": config.to_dict(), "config_hash": config.config_hash, "seed": config.seed}
        return Drawn(trial, number, {**started, **plain, "epoch_cost": cost}, config)
