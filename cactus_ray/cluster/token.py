"""The token of a local Ray: whoever can read it may run code as this user, so it is never readable by others.

Ray makes the file itself where there is none, but with the permissions of any other file, and starts for seconds before
anybody could change them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from cactus_ray.errors import UserError

NAME = "auth_token"
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def secure_token() -> None:
    """Make Ray's token where a local Ray needs one, readable by its owner alone, before Ray starts.

    Kept as they are: RAY_AUTH_TOKEN, and any RAY_AUTH_MODE but ``token``. Else the file is that of RAY_AUTH_TOKEN_PATH,
    or ``~/.ray/auth_token``, where Ray looks for it; where that cannot be written or closed to others, one in a private
    folder, of which RAY_AUTH_TOKEN_PATH then tells Ray and its processes. Safe for several starts at once: the first
    token stays. Raises UserError where RAY_AUTH_TOKEN_PATH names no readable token.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    if close_token():
        return
    usual = _usual()
    if usual is None or not usual.parent.parent.is_dir() or not _made(usual):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_elsewhere())


def close_token() -> bool:
    """Take the token file that Ray would read away from others. Whether RAY_AUTH_TOKEN_PATH names that file.

    Raises UserError where RAY_AUTH_TOKEN_PATH names no readable token.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else _usual()
    if path is not None:
        with contextlib.suppress(OSError):  # not there, or not ours
            _close(path)
    if not named or path is None:
        return False
    try:
        empty = not path.read_text().strip()
    except (OSError, ValueError) as error:
        raise _no_token(named, str(error)) from error
    if empty:
        raise _no_token(named, "it is empty")
    return True


def _usual() -> Path | None:
    """Where Ray looks by itself: below HOME, or below the home folder of the user where HOME is not set."""
    home = os.environ.get("HOME")
    if home is None:
        with contextlib.suppress(RuntimeError):  # a user without an entry, as in containers
            home = str(Path.home())
    return Path(home) / ".ray" / NAME if home else None


def _no_token(named: str, reason: str) -> UserError:
    return UserError(
        f"RAY_AUTH_TOKEN_PATH: got {named!r}; expected a readable file that holds Ray's token, or no such variable "
        f"({' '.join(reason.split())})"
    )


def _close(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        path.chmod(mode & ~OTHERS)


def _made(path: Path) -> bool:
    """Whether there is a token at ``path`` that we can read and others cannot; one is made where there is none."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not (path.exists() and path.read_text().strip()):
            _write(path)
        _close(path)
        return bool(path.read_text().strip()) and not path.stat().st_mode & OTHERS
    except (OSError, ValueError):
        return False


def _write(path: Path) -> None:
    """Write a new token, all of it or nothing, unless another start was first."""
    part = path.with_name(f".{NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
            file.write(secrets.token_hex(32))  # as Ray makes them
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:  # another start was first, or Ray was killed before it wrote
            if path.stat().st_size == 0:
                part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def _elsewhere() -> Path:
    """A token in the user's runtime folder, or in a folder that ends with this process."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    with contextlib.suppress(OSError):
        found = runtime.stat()
        path = runtime / f"cactus-ray-{NAME}"
        if found.st_uid == os.geteuid() and not found.st_mode & OTHERS and _made(path):
            return path
    folder = Path(tempfile.mkdtemp(prefix="cactus-ray-token-"))  # with mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / NAME
    _write(path)
    return path
