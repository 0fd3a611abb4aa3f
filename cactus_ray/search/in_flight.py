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
from cactus_ray.search.store import write_whole
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


def keep_state(run: Path, trial: str, epoch: int, data: bytes) -> None:
    """Keep the state of a trial, in place of an older one. It is whole on the disk before the older one goes."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{trial}-{epoch}-{hashlib.sha256(data).hexdigest()}.safetensors"
    write_whole(path, data)
    for file in _files(run, trial):
        if file != path:
            file.unlink()


def kept_state(run: Path, trial: str, config: RunConfig) -> Kept:
    """The furthest state of a trial from which training under ``config`` can go on."""
    notes = []
    mine = [file for file in _files(run, trial) if file.suffix == ".safetensors"]
    for file in sorted(mine, key=lambda file: -_epoch(file)):
        data = file.read_bytes()
        if fault := _fault(file, data, config):
            notes.append(f"{FOLDER}/{file.name} is passed over: {fault}")
        else:
            return Kept(_epoch(file), data, tuple(notes))
    return Kept(notes=tuple(notes))


def forget_states(run: Path, under_way: Collection[str]) -> None:
    """Delete the states of all trials but those that are under way, and what a driver that died left half written."""
    for file in _files(run):
        if _trial(file) not in under_way or file.suffix == ".tmp":
            file.unlink(missing_ok=True)


def forget_state(run: Path, trial: str) -> None:
    """Delete the states of a trial that has ended."""
    for file in _files(run, trial):
        file.unlink(missing_ok=True)


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


def _files(run: Path, trial: str | None = None) -> list[Path]:
    """Files of ours, or of one trial, temporary ones among them; what else lies there is not touched."""
    folder = run / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    if trial is not None:  # many may wait, and looking closely at all of them takes long
        names = [name for name in names if name.startswith((f"{trial}-", f".{trial}-"))]
    files = [folder / name for name in names if _NAME.fullmatch(name)]
    return [file for file in files if trial in (None, _trial(file))]


def _trial(file: Path) -> str:
    found = _NAME.fullmatch(file.name)
    assert found is not None
    return found["trial"]


def _epoch(file: Path) -> int:
    found = _NAME.fullmatch(file.name)
    assert found is not None
    return int(found["epoch"])
