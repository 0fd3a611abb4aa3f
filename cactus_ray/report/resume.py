"""How a search that ended early goes on, as a command that a shell takes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cactus_ray.search.space import Space

RUNS = Path("runs")
"""Where ``cactus-ray search`` keeps its runs by default."""


def go_on(command: Sequence[str]) -> str:
    """What is said of an interrupted search."""
    return f"interrupted; what is finished is kept; go on with: {shlex.join(command)}"


def resume_arguments(run: Path, **options: object) -> list[str]:
    """The arguments with which ``cactus-ray`` goes on with a run.

    ``options``: those of ``search`` that the records do not keep, by name; None and False: not given, True: a flag.
    """
    words = ["search", "--resume", run.name]
    if run.parent != RUNS:
        words += ["--runs", str(run.parent)]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def begun_as(run: Path) -> bytes | None:
    """The first line of a run's records, which no other study has; None where there are no records."""
    try:
        with (run / "trials.jsonl").open("rb") as file:
            return file.readline() or None
    except OSError:
        return None


def keeps(run: Path, space: Space) -> bool:
    """Whether a run's folder holds this space, so that ``--resume`` goes on with what was asked."""
    from cactus_ray.search.document import dump_yaml

    try:
        return (run / "space.yaml").read_text(encoding="utf-8") == dump_yaml(space.to_dict())
    except OSError:
        return False
