"""What is said about a user's own network before it is trained."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console

from cactus_ray.config import TrainConfig
from cactus_ray.models import Untrained


def print_remarks(untrained: Untrained, train: TrainConfig, *, replaced: bool) -> None:
    """Print to standard error which tensors of a factory's network stay as they are, one line for each reason.

    ``replaced``: every tensor starts as in a network file (``--init``).
    """
    console = Console(stderr=True, markup=False, emoji=False)
    for line in remarks(untrained, train, replaced=replaced):
        console.print(line, highlight=False, soft_wrap=True)


def remarks(untrained: Untrained, train: TrainConfig, *, replaced: bool) -> list[str]:
    """The lines of ``print_remarks``."""
    assert untrained.network.config is not None
    found, path = [], untrained.network.config.model.factory
    hidden = {f"{node.name}.weight" for node in untrained.network.graph.weighted()[:-1]}
    given = (untrained.given - untrained.frozen) & hidden
    if given and train.initialization == "ibp" and not replaced:
        found.append(
            f"{path} sets {_listed(given)} itself: training starts from these values, and train.initialization: ibp is "
            "for what torch draws"
        )
    if untrained.frozen:
        found.append(
            f"{path} sets requires_grad=False for {_listed(untrained.frozen)}: training leaves it as it is; levels "
            "(pruning, rounding) still change it"
        )
    return found


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    more = f" and {len(names) - len(shown)} more tensors" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
