"""How a study begins: warm starts, runs that are replaced, and what it does not go on with. No Ray is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from cactus_ray.cluster.driver import DriverOptions
from cactus_ray.commands import search as module
from cactus_ray.commands.search import SearchOptions, search
from cactus_ray.data import DataSet
from cactus_ray.errors import UserError
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 128},
    "model": {"name": "mlp", "hidden": [8]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense"],
    "train": {"epochs": 1, "batch_size": 64},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 2, "concurrency": 1},
    "verification": {"samples": 40},
}


class Killed(BaseException):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "own.db"
    study = optuna.create_study(directions=["maximize"] * 2, storage=f"sqlite:///{file}", study_name="own")
    floats = optuna.distributions.FloatDistribution(0.001, 0.01)
    study.add_trial(
        optuna.create_trial(params={"learning_rate": 0.005}, distributions={"learning_rate": floats}, values=[0.5, 0.6])
    )
    return file


@pytest.fixture
def killed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Space, Path]:
    """A run whose driver was killed between its first event and the warm start."""
    monkeypatch.setattr(module, "run_study", lambda *rest: None)
    monkeypatch.setattr(module, "write_page", lambda run: None)

    def kill(self: Study, past: Any) -> None:
        raise Killed

    tiny, run = parse_space(SPACE, "tiny.yaml"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Study, "warm", kill)
        with pytest.raises(Killed):
            search(tiny, SearchOptions(run=run, progress=False, source=str(source), source_study="own"))
    assert read_records(run).past == []
    return tiny, run


def test_it_is_taken_up_by_the_next_driver_without_being_asked_for(killed: tuple[Space, Path]) -> None:
    space, run = killed
    search(space, SearchOptions(run=run, progress=False))
    (past,) = read_records(run).past
    assert [row["parameters"] for row in past["trials"]] == [{"learning_rate": 0.005}]
    search(space, SearchOptions(run=run, progress=False))
    assert len(read_records(run).past) == 1


def test_where_it_is_gone_the_search_says_so_and_starts_nothing(killed: tuple[Space, Path], source: Path) -> None:
    space, run = killed
    source.unlink()
    before = (run / "trials.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"begun with --from .*own.db.*killed.*--from-scratch"):
        search(space, SearchOptions(run=run, progress=False))
    assert (run / "trials.jsonl").read_bytes() == before


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Space, Path]:
    """A run that has begun, with a file of which nothing may be lost."""
    monkeypatch.setattr(module, "run_study", lambda *rest: None)
    monkeypatch.setattr(module, "write_page", lambda run: None)
    tiny, run = parse_space(SPACE, "tiny.yaml"), tmp_path / "runs" / "tiny"
    search(tiny, SearchOptions(run=run, progress=False))
    (run / "network.safetensors").write_bytes(b"trained for days")
    return tiny, run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.parent.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "nowhere"), ("itself", "which --from-scratch would delete; choose another --name")],
)
def test_a_run_is_not_deleted_for_one_that_cannot_begin(source: str, message: str, begun: tuple[Space, Path]) -> None:
    space, run = begun
    before = contents(run)
    given = str(run) if source == "itself" else source
    with pytest.raises(UserError, match=message):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True, source=given))
    assert contents(run) == before


def test_a_run_that_fails_to_begin_brings_the_old_one_back(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = begun
    before = contents(run)

    def full(*rest: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "begin", full)
        with pytest.raises(OSError, match="No space left"):
            search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert contents(run) == before
    search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert not (run / "network.safetensors").exists()
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]  # nothing stands aside any more


def test_a_study_goes_on_with_its_own_images_and_network_only(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = begun
    search(space, SearchOptions(run=run, progress=False))
    before = contents(run)
    other = DriverOptions(init=b"another network")
    with pytest.raises(
        UserError, match=r"--init: got of SHA-256 \w{16}; .*tiny was begun with none: expected the same"
    ):
        search(space, SearchOptions(run=run, progress=False, driver=other))
    original = module.load

    def load(*arguments: Any) -> DataSet:
        data = original(*arguments)
        return replace(data, digests=data.digests | {"selection": "0" * 64})

    monkeypatch.setattr(module, "load", load)
    with pytest.raises(
        UserError, match=r"begun with other images: the selection split had SHA-256 \w{16}, digits has 0000"
    ):
        search(space, SearchOptions(run=run, progress=False))
    assert contents(run) == before
