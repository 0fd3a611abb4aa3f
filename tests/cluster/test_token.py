"""Ray's token: made before Ray starts, never readable by others, and wherever this user can keep it."""

from __future__ import annotations

import concurrent.futures
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cactus_ray.cluster import token
from cactus_ray.cluster.connect import connected
from cactus_ray.cluster.token import close_token, secure_token
from cactus_ray.errors import UserError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "XDG_RUNTIME_DIR")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HOME, none of Ray's variables, and the permissions that files have by default."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    token._elsewhere.cache_clear()
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    before = os.umask(0o022)
    yield folder
    os.umask(before)
    token._elsewhere.cache_clear()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_alone_from_its_first_moment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real_open, real_link = os.open, os.link

    def watched_open(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        found = real_open(path, flags, mode, **options)
        if str(path).startswith(str(home)):
            made.append(stat.S_IMODE(os.fstat(found).st_mode))  # before anything is written
        return found

    def watched_link(source: Path, target: Path) -> None:
        assert (mode_of := mode(Path(source))) == 0o600, oct(mode_of)
        assert len(Path(source).read_text()) == 64
        real_link(source, target)
        made.append(mode(Path(target)))

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "link", watched_link)
    secure_token()
    file = home / ".ray" / "auth_token"
    assert made == [0o600, 0o600]
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert bytes.fromhex(file.read_text())
    assert [p.name for p in file.parent.iterdir()] == ["auth_token"]
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    first = file.read_text()
    secure_token()
    assert file.read_text() == first


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_whatever_the_umask_the_owner_reads_and_nobody_else(home: Path, umask: int) -> None:
    (home / ".ray").mkdir()
    os.umask(umask)
    secure_token()
    assert mode(home / ".ray" / "auth_token") == 0o600


def test_a_token_that_others_can_read_is_taken_from_them_and_kept(home: Path) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("abc\n")
    for secure in (secure_token, close_token):
        file.chmod(0o644)
        secure()
        assert (mode(file), file.read_text()) == (0o600, "abc\n")


def test_an_empty_file_that_ray_left_gets_a_token(home: Path) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.touch(mode=0o644)
    secure_token()
    assert (mode(file), len(file.read_text())) == (0o600, 64)


START = "from cactus_ray.cluster.token import secure_token; secure_token(); print(open(FILE).read())"


def test_starts_at_once_agree_on_one_token(home: Path) -> None:
    program = START.replace("FILE", repr(str(home / ".ray" / "auth_token")))

    def start(_: int) -> str:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(start, range(4)))) == 1


def test_a_start_that_comes_second_takes_the_token_of_the_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = home / ".ray" / "auth_token", os.link

    def late(source: Path, target: Path) -> None:
        Path(target).write_text("the first")
        real(source, target)

    monkeypatch.setattr(os, "link", late)
    secure_token()
    assert file.read_text() == "the first"
    assert mode(file) == 0o600


@pytest.mark.parametrize("how", ["a file", "missing", "empty", "no hard links"])
def test_without_a_home_the_token_is_in_a_private_folder_and_ray_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "a file":
        home.rmdir()
        home.touch()
    elif how == "missing":
        home.rmdir()
    elif how == "empty":
        monkeypatch.setenv("HOME", "")
    else:

        def refuse(source: Path, target: Path) -> None:
            if str(target).startswith(str(home)):
                raise PermissionError(1, "Operation not permitted")
            os.rename(source, target)

        monkeypatch.setattr(os, "link", refuse)
    secure_token()
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert len(file.read_text()) == 64
    secure_token()
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]) == file
    assert not (home / ".ray" / "auth_token").exists()


def test_the_users_runtime_folder_is_taken_where_it_is_private(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("HOME", "/proc/self")  # where nobody writes, not even root
    secure_token()
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert (file.parent, mode(file)) == (runtime, 0o600)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    token._elsewhere.cache_clear()
    runtime.chmod(0o755)
    secure_token()
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent != runtime


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_TOKEN": "abc"}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "k8s"}, {"RAY_AUTH_MODE": ""}]
)
def test_a_token_or_a_mode_that_is_given_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    secure_token()
    assert list(home.iterdir()) == []
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == given


def test_a_file_that_is_named_is_closed_and_used(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("abc")
    file.chmod(0o664)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    secure_token()
    assert (mode(file), file.read_text(), list(home.iterdir())) == (0o600, "abc", [])


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe"])
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_file_that_is_named_and_holds_no_token_is_bad_input(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes | None, address: str | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    words = r"RAY_AUTH_TOKEN_PATH: got '.*/token'; expected a readable file"
    with pytest.raises(UserError, match=words) as found, connected(address):
        pass
    assert found.value.exit_status == 2


WATCHED = """
import os, stat, sys, threading
from pathlib import Path
from cactus_ray.cluster.connect import connected
file, open_to, done = Path.home() / ".ray" / "auth_token", [], threading.Event()
def watch():
    while not done.wait(0.001):
        try:
            mode = file.stat().st_mode
        except OSError:
            continue
        if mode & 0o077:
            open_to.append(oct(mode))
watcher = threading.Thread(target=watch)
watcher.start()
try:
    with connected(None, cpus=1):
        import ray
        assert ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())
        assert os.environ["RAY_AUTH_MODE"] == "token"
        print(os.environ.get("RAY_AUTH_TOKEN_PATH", file))
finally:
    done.set()
    watcher.join()
assert not open_to, open_to
"""


@pytest.mark.ray
@pytest.mark.parametrize("usable", [True, False])
def test_a_real_ray_starts_with_it_and_it_is_never_open(home: Path, usable: bool) -> None:
    if not usable:
        home.rmdir()
        home.touch()
    found = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    file = Path(found.stdout.split()[-1])
    assert (file == home / ".ray" / "auth_token") == usable
    assert file.exists() == usable  # the private folder ends with its process
    if usable:
        assert mode(file) == 0o600
