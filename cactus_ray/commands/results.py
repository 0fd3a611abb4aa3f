"""Results that are appended as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

from cactus_ray.errors import UserError
from cactus_ray.search.store import append_line

T = TypeVar("T")


class Results:
    """A JSON-lines file: first the settings, then one object per result. Use ``open_results``."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.rows = rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one result; it is on disk when this returns."""
        append_line(self.path, row)
        self.rows.append(dict(row))


@contextmanager
def open_results(path: Path, settings: Mapping[str, Any]) -> Iterator[Results]:
    """The results in ``path``, begun here or earlier with the same settings; locked against a second run.

    A line that a killed run tore is left out and computed again. Raises UserError, naming the keys, for a file that
    was begun with other settings, and for one that is something else or in use.
    """
    plain = json.loads(json.dumps(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            rows = _read(path, plain)
            if rows is None:
                append_line(path, {"settings": plain})
            yield Results(path, rows or [])
    except filelock.Timeout:
        raise UserError(f"--out: {path} is in use by another run") from None
    except OSError as error:
        raise UserError(f"--out: {path} cannot be used ({error.strerror})") from error


def _read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The results so far; None for a file that has not begun."""
    if not path.exists() or b"\n" not in (data := path.read_bytes()):
        if path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
            raise UserError(f"--out: {path} is no file of results; choose another name")
        return None
    parsed = [_parsed(line) for line in data.split(b"\n")]
    found = next((p for p in parsed if p is not None), None)
    earlier = found.get("settings") if found is not None else None
    if not isinstance(earlier, dict):
        raise UserError(f"--out: {path} is no file of results; choose another name")
    differing = [key for key in sorted({*earlier, *settings}) if earlier.get(key) != settings.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"--out: {path} was begun with other settings ({', '.join(differing)}: {key} was {earlier.get(key)!r}, is"
            f" {settings.get(key)!r}); continue with the same ones or choose another file"
        )
    rows = [p for p in parsed if p is not None and "settings" not in p]
    for row in rows:
        if not isinstance(row.get("result"), dict):
            raise UserError(f"--out: {path}: {json.dumps(row)[:80]} holds no result; remove that line")
    return rows


def recorded(kind: type[T], plain: Mapping[str, Any], record: Results | None) -> T:
    """A result as it was written from a dataclass. UserError for one with other fields."""
    try:
        return kind(**plain)
    except TypeError as error:
        place = record.path if record is not None else ""
        raise UserError(f"--out: {place}: {json.dumps(plain)[:80]} is no such result; remove that line") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None
