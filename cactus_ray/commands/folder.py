"""The folder of a run as a search opens it: new, replaced, or of a study that goes on with what it was begun with."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cactus_ray.errors import UserError
from cactus_ray.search.document import dump_yaml
from cactus_ray.search.journal import Event
from cactus_ray.search.space import Space, load_space
from cactus_ray.search.store import RunStore

_MAY_CHANGE = (
    "search.trials", "search.points", "search.seeds", "search.fresh_samples", "search.keep", "data.root", "wandb",
    "resources",
)  # fmt: skip

logger = logging.getLogger(__name__)


class Replaced:
    """The run that ``--from-scratch`` deletes, if any: it stands aside until a trial of the new one starts.

    Up to then a search can still be refused, by what it starts from or by the cluster, and then the old run comes back.
    """

    def __init__(self, run: Path, aside: Path | None) -> None:
        self.run, self.aside = run, aside

    def event(self, event: Event) -> None:
        """Take up one event of the new study."""
        if event["event"] == "started":
            self.delete()

    def delete(self) -> None:
        """The old run goes for good."""
        aside, self.aside = self.aside, None  # first: what is half deleted must not come back
        if aside is not None:
            try:
                shutil.rmtree(aside)
            except OSError as error:  # the new study need not end for that
                logger.warning("%s: could not be deleted (%s); delete it by hand", aside, error)

    def bring_back(self) -> None:
        """The old run gets its name back, unless it is taken: then it stays where it is, and a warning says so."""
        aside, self.aside = self.aside, None
        if aside is None:
            return
        if self.run.exists():
            logger.warning("%s: the run that --from-scratch was to delete is still there as %s", self.run, aside)
        else:
            aside.rename(self.run)


@contextlib.contextmanager
def opened(
    space: Space, run: Path, *, from_scratch: bool = False, source: str | None = None
) -> Iterator[tuple[RunStore, Replaced]]:
    """The locked folder of a run, and the run that it replaces, which wants to hear of the study's events.

    Where the block ends by an exception before anything was recorded, or before a trial started of a run that replaces
    another, everything is as it was before. Raises UserError for a run of another space, for a folder that is no run or
    in use, and for a ``source`` in the run that is to be deleted.
    """
    replaced = Replaced(run, _set_aside(run, source) if from_scratch and run.exists() else None)
    new = not run.exists()
    try:
        with (store := RunStore(run)).lock():
            try:
                _refuse_other_space(space, run)
                yield store, replaced
            except BaseException:
                if replaced.aside is not None or (new and not store.file.exists()):
                    shutil.rmtree(run, ignore_errors=True)
                raise
    except BaseException:
        replaced.bring_back()
        raise
    replaced.delete()


def _set_aside(run: Path, source: str | None) -> Path:
    """The run under another name beside it, with which it is a run like any other, should the driver be killed."""
    if not (run / "trials.jsonl").exists() and any(run.iterdir()):
        raise UserError(f"--from-scratch: {run} holds no trials.jsonl, so it is not a run of ours; nothing was deleted")
    if source is not None and Path(source.removeprefix("sqlite:///")).resolve().is_relative_to(run.resolve()):
        raise UserError(f"--from: got {source!r}, which --from-scratch would delete; choose another --name")
    if run.is_symlink():
        raise UserError(f"--from-scratch: {run} is a link to {run.resolve()}; delete that by hand, nothing was deleted")
    with RunStore(run).lock():
        pass  # refuse while another driver works in it
    names = (run.with_name(f"{run.name}.replaced{number}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    try:
        return run.rename(aside)
    except OSError as error:  # a mount, or no right to write beside it
        raise UserError(f"--from-scratch: {run} cannot be renamed ({error.strerror}); nothing was deleted") from error


# --- what a study goes on with -------------------------------------------------------------------------------------


def _refuse_other_space(space: Space, run: Path) -> None:
    written = run / "space.yaml"
    if written.exists() and (difference := _difference(load_space(written).to_dict(), space.to_dict())):
        raise UserError(
            f"{run}: made with another space ({difference}); choose another --name, or --from-scratch to delete it"
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str | None:
    """The first key that differs; the number of trials may grow, and limits, points and where work runs may change."""
    for key in sorted({*before, *now}):
        place = f"{path}{key}"
        if place in _MAY_CHANGE or place.startswith(("search.max_", "search.plateau")):
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if found := _difference(old, new, f"{place}."):
                return found
        elif old != new:
            return f"{place}: {old!r} there, {new!r} now"
    return None


def refuse_other_init(run: Path, study: Mapping[str, Any], digest: str | None) -> None:
    """Raise UserError where a study would go on from another network than it was begun from, or from none."""
    if "init" in study and study["init"] != digest:
        was, here = (f"of SHA-256 {d[:16]}" if d else "none" for d in (study["init"], digest))
        raise UserError(f"--init: got {here}; {run} was begun with {was}: expected the same, or another --name")


def write_space(space: Space, path: Path) -> None:
    """Whole or not at all: a driver that is killed leaves a space that can be read."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(dump_yaml(space.to_dict()), encoding="utf-8")
    part.replace(path)
