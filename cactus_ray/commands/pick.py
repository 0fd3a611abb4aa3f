"""``cactus-ray pick`` and ``cactus-ray check``: what they show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cactus_ray.commands.families import FamilyOptions
from cactus_ray.config import parse, to_dict
from cactus_ray.deploy.export import pick as run_pick
from cactus_ray.deploy.recheck import check as run_check
from cactus_ray.deploy.requirements import Requirements
from cactus_ray.search.space import load_space
from cactus_ray.verification.verdict import VerificationSettings


@contextmanager
def stages(console: Console, enabled: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar per stage that reports (stage, done, total)."""
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not enabled, transient=True) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


def pick(
    console: Console, run: Path, to: Path, requirements: Requirements, *,
    bound: str | None, samples: int | None, root: Path | None, as_json: bool, family: FamilyOptions | None = None,
) -> bool:  # fmt: skip
    """Pick, certify and explain; False where the requirements are not met on the test split.

    ``bound`` certifies with another bound than the study used, usually a dearer one; ``family`` also every rounding of
    the picked file's weights at once.
    """
    settings = None
    if bound is not None:
        of_study = to_dict(load_space(run / "space.yaml").verification)
        settings = parse(VerificationSettings, {**of_study, "bound": bound}, "verification")
    with stages(console, not as_json) as progress:
        result = run_pick(
            run, requirements, to, samples=samples, settings=settings, root=None if root is None else str(root),
            progress=progress, family=None if family is None else partial(family.at, place="--level"),
        )  # fmt: skip
    if as_json:
        console.print_json(json.dumps(result.to_json()))
    else:
        for line in result.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return result.met


def check(console: Console, folder: Path, root: Path | None, *, as_json: bool) -> bool:
    """Re-verify a pick and list every finding; False where there is one."""
    with stages(console, not as_json) as progress:
        found = run_check(folder, root=None if root is None else str(root), progress=progress)
    if as_json:
        console.print_json(json.dumps(found.to_json()))
        return found.ok
    for finding in found.findings:
        console.print(f"FOUND: {finding}", style="red", highlight=False, markup=False, soft_wrap=True)
    if found.ok:
        console.print(
            f"{folder}: the certificate holds: {found.certified_again} verdicts certified again from the file, "
            f"{found.replayed} counterexamples replayed, standard accuracy {found.standard_accuracy:.2%}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    return found.ok
