"""A warm start of a search whose driver is killed before it has taken it up. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from tiny_space import SPACE

from cactus_ray.commands import search as module
from cactus_ray.commands.search import SearchOptions, search
from cactus_ray.errors import UserError
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study


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
