"""Training states of trials under way, kept so that a later driver goes on from them.

``in_flight/TRIAL-EPOCH-SHA256.safetensors`` in the folder of a run: the name holds the digest of the content, so that a
file that was torn or changed is known without any other record. A trial has one, and two while one replaces the other;
it has none once it has ended. One that waits to be promoted keeps its last one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cactus_ray.config import RunConfig
from cactus_ray.errors import UserError
from cactus_ray.search.store import temporary, write_whole
from cactus_ray.training.state import unpack_state

FOLDER = "in_flight"
_NAME = re.compile(r"\.?(?P<trial>.+)-(?P<epoch>\d+)-(?P<digest>[0-9a-f]{64})\.safetensors(\.tmp)?")


@dataclass(frozen=True, slots=True)
class Kept:
    """A state (``training.loop.EpochReport.save``) after so many epochs. ``epoch`` 0, and no bytes: from the start.

    ``notes``: of every file that was passed over, why.
    """

    epoch: int = 0
    data: bytes | None = None
    notes: tuple[str, ...] = ()


class States:
    """The states of a run's trials, for the one driver of the run.

    The folder is listed once, since thousands may wait in it; from then on what is there is known from what was kept
    and forgotten. Files that are not states are not touched.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self.files: dict[str, set[Path]] = {}  # by trial, temporary ones among them
        for name in os.listdir(self.folder) if self.folder.is_dir() else ():
            if found := _NAME.fullmatch(name):
                self.files.setdefault(found["trial"], set()).add(self.folder / name)

    def keep(self, trial: str, epoch: int, data: bytes) -> None:
        """Keep the state of a trial, in place of older ones. It is whole on the disk before the older ones go."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{trial}-{epoch}-{hashlib.sha256(data).hexdigest()}.safetensors"
        older = self.files.get(trial, set()) - {path}
        self.files[trial] = older | {path, temporary(path)}  # what may be there if this ends half way
        write_whole(path, data)
        for file in older:
            file.unlink(missing_ok=True)
        self.files[trial] = {path}

    def kept(self, trial: str, config: RunConfig) -> Kept:
        """The furthest state of a trial from which training under ``config`` can go on."""
        notes: list[str] = []
        mine = [file for file in self.files.get(trial, ()) if file.suffix == ".safetensors"]
        for file in sorted(mine, key=lambda file: (-_epoch(file), file.name)):
            data = file.read_bytes() if file.is_file() else None
            fault = "it is not there" if data is None else _fault(file, data, config)
            if fault is None:
                return Kept(_epoch(file), data, tuple(notes))
            notes.append(f"{FOLDER}/{file.name} is passed over: {fault}")
        return Kept(notes=tuple(notes))

    def forget(self, trial: str) -> None:
        """Delete the states of a trial that has ended."""
        for file in self.files.pop(trial, ()):
            file.unlink(missing_ok=True)

    def forget_others(self, under_way: Collection[str]) -> None:
        """Delete the states of all trials but those under way, and what a driver that died left half written."""
        for trial in self.files.keys() - set(under_way):
            self.forget(trial)
        for trial, files in self.files.items():
            half = {file for file in files if file.suffix == ".tmp"}
            for file in half:
                file.unlink(missing_ok=True)
            self.files[trial] = files - half


def _fault(file: Path, data: bytes, config: RunConfig) -> str | None:
    if hashlib.sha256(data).hexdigest() not in file.name:
        return "its content is not what was written"
    try:
        state = unpack_state(data, file.name)
    except UserError as error:
        return str(error)
    if state.config_hash != config.config_hash:
        return f"it is of the configuration {state.config_hash}, not {config.config_hash}"
    if state.epoch != _epoch(file) or state.epoch > config.train.epochs:
        return f"it is of epoch {state.epoch} of {config.train.epochs}"
    return None


def _epoch(file: Path) -> int:
    found = _NAME.fullmatch(file.name)
    assert found is not None
    return int(found["epoch"])
