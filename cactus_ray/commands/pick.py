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
from cactus_ray.deploy.export import PickResult, pick_file
from cactus_ray.deploy.export import pick as run_pick
from cactus_ray.deploy.recheck import NOT_CHECKED
from cactus_ray.deploy.recheck import check as run_check
from cactus_ray.deploy.requirements import Requirements, option
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.search.space import load_space
from cactus_ray.texts import visible
from cactus_ray.verification.verdict import VerificationSettings


@contextmanager
def stages(console: Console, enabled: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar per stage that reports (stage, done, total)."""
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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

    ``run``: also a network file (.safetensors), of which a level is certified and nothing else can be required.
    ``bound`` certifies with another bound than the study used, usually a dearer one; ``family`` also every rounding of
    the picked file's weights at once.
    """
    of_file = run.suffix == ".safetensors"
    level = _only_level(requirements) if of_file else ""
    settings = None
    if bound is not None:
        of_study = {} if of_file else to_dict(load_space(run / "space.yaml").verification)
        settings = parse(VerificationSettings, {**of_study, "bound": bound}, "verification")
    around = None if family is None else partial(family.at, place="--level")
    base = None if root is None else str(root)
    with stages(console, not as_json) as progress:
        if of_file:
            result = pick_file(
                run, level, to, samples=samples, settings=settings, root=base, progress=progress, family=around
            )
        else:
            result = run_pick(
                run, requirements, to, samples=samples, settings=settings, root=base, progress=progress, family=around
            )
    _print(console, result, as_json)
    return result.met


def _only_level(requirements: Requirements) -> str:
    """The level of a network file to write. UserError where there is none, or where more is asked."""
    unasked = Requirements()
    for key in ("max_bytes", "min_certified", "min_accuracy", "prefer", "trial"):
        if (asked := getattr(requirements, key)) != getattr(unasked, key):
            raise ConfigError(option(key), asked, "nothing beside a network file: it has no points to choose from")
    if requirements.level is None:
        raise UserError("--level: a network file has no points to choose from; say what to write, such as --level int8")
    return requirements.level


def _print(console: Console, result: PickResult, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(result.to_json()))
        return
    for line in result.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def check(console: Console, folder: Path, root: Path | None, *, as_json: bool) -> bool:
    """Re-verify a pick and list every finding; False where there is one."""
    with stages(console, not as_json) as progress:
        found = run_check(folder, root=None if root is None else str(root), progress=progress)
    if as_json:
        console.print_json(json.dumps(found.to_json()), ensure_ascii=True)
        return found.ok
    for finding in found.findings:
        # findings quote what a stranger wrote
        text = f"FOUND: {visible(finding)}"
        console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    if found.ok:
        console.print(
            f"{visible(str(folder))}: the certificate holds: {found.certified_again} verdicts certified again from the "
            f"file, {found.replayed} counterexamples replayed, standard accuracy {found.standard_accuracy:.2%}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print("Not checked, because the files and the data do not show it:", highlight=False)
    for what in NOT_CHECKED:
        console.print(f"- {what}", highlight=False, markup=False, soft_wrap=True)
    return found.ok
