"""Copies of what is recorded, and the command line as a user calls it. Nothing here knows the package's modules.

The package may be rebuilt; folders, files and verbs stay. So tests of this folder use only ``cactus_ray.cli.main``,
the entry point of the console script.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded_support import DATA, RECORDED, Answer, CactusRay, Copied

from cactus_ray import cli


@pytest.fixture(autouse=True, scope="module")
def _unchanged() -> Iterator[None]:
    """No test writes into what is recorded."""

    def contents() -> dict[str, str]:
        files = (file for folder in DATA for file in sorted((RECORDED / folder).rglob("*")) if file.is_file())
        return {str(file.relative_to(RECORDED)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = contents()
    yield
    assert contents() == before


@pytest.fixture
def cactus_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CactusRay:
    """Calls the command line in this process: ``cactus_ray("status", run, "--json").json``."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["cactus-ray", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:  # those of a command are meant for its own process
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def copied(tmp_path: Path) -> Copied:
    """Copies a recorded file or folder into a folder of the test's own: ``copied("studies/warm")``."""

    def copy(name: str) -> Path:
        to = tmp_path / name
        to.parent.mkdir(parents=True, exist_ok=True)
        source = RECORDED / name
        return Path(shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to))

    return copy
