"""Where data come from and results go, tried before the work that hangs on it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from cactus_ray.errors import UserError

FOLDER = "a folder that all nodes see, such as /mnt/shared/runs: object stores and URLs are not read or written"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def local_folder(option: str, value: str) -> str:
    """``value``. Raises UserError, naming ``option``, for an address such as s3://bucket: there is no folder behind."""
    if SCHEME.match(value):
        raise UserError(f"{option}: got {value!r}; expected {FOLDER}")
    return value


def try_files(out: Path, *files: Path) -> None:
    """Raises UserError, naming ``--out`` and ``out``, unless all ``files`` can be written; folders may be missing.

    What is missing is made and removed again: nothing is left behind, and what is there stays as it is.
    """
    made: list[Path] = []
    try:
        for file in files:
            for folder in reversed([p for p in file.parents if not p.exists()]):
                folder.mkdir()
                made.append(folder)
            if file.is_dir():
                raise UserError(f"--out {out}: {file} is a folder; expected a file or nothing there")
            if not file.exists():
                with file.open("xb") as stream:
                    made.append(file)
                    stream.write(b"\0")  # a full disk refuses the first byte
            elif not os.access(file, os.W_OK):
                raise PermissionError(13, "Permission denied", str(file))
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # a folder in which another process has begun to write stays
                path.rmdir() if path.is_dir() else path.unlink()


def unwritable(out: Path, error: OSError) -> UserError:
    """The error of an output that the operating system refuses."""
    reason = error.strerror or str(error)
    if error.filename is not None and Path(error.filename) != out:
        reason += f", {error.filename}"
    return UserError(f"--out {out}: cannot be written ({reason}); expected a place with the right and room to write")
