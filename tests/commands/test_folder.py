"""The folder of a run as a search opens it: what is replaced, and what comes back. No Ray is started."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_space import SPACE

from cactus_ray.cluster.driver import DriverOptions
from cactus_ray.commands import search as module
from cactus_ray.commands.folder import opened
from cactus_ray.commands.search import SearchOptions, resumed, search
from cactus_ray.commands.single import of_trial
from cactus_ray.data import DataSet
from cactus_ray.errors import UserError
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import RunStore, read_records
from cactus_ray.search.study import Study


def one_trial(study: Study, *rest: Any) -> None:
    assert study.next_trial() is not None


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Space, Path]:
    """A run with a trial and a network. Searches from here on start one trial and end."""
    monkeypatch.setattr(module, "run_study", one_trial)
    monkeypatch.setattr(module, "write_page", lambda run: None)
    tiny, run = parse_space(SPACE, "tiny.yaml"), tmp_path / "runs" / "tiny"
    search(tiny, SearchOptions(run=run, progress=False))
    (run / "network.safetensors").write_bytes(b"trained for days")
    return tiny, run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_the_cluster_refuses_deletes_no_run(begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    space, run = begun
    before = contents(run.parent)

    def refused(*rest: Any) -> None:
        raise UserError("--address: got 'nowhere'")

    monkeypatch.setattr(module, "run_study", refused)
    with pytest.raises(UserError, match="--address"):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert contents(run.parent) == before


def test_the_old_run_goes_when_the_first_trial_starts(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = begun
    seen = []

    def watched(study: Study, *rest: Any) -> None:
        seen.append(sorted(path.name for path in run.parent.iterdir()))
        one_trial(study)
        seen.append(sorted(path.name for path in run.parent.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_study", watched)
    with pytest.raises(KeyboardInterrupt):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert seen == [["tiny", "tiny.replaced0"], ["tiny"]]
    assert not (run / "network.safetensors").exists()
    assert list(read_records(run).trials) == ["t0001"]


def test_a_run_whose_driver_was_killed_meanwhile_is_one_that_can_be_resumed(
    begun: tuple[Space, Path],
) -> None:
    space, run = begun
    before = contents(run)
    with opened(space, run, from_scratch=True):
        shutil.copytree(run.with_name("tiny.replaced0"), run.with_name("seen"))  # what a kill would leave
    run.with_name("seen").rename(run.with_name("tiny.replaced0"))
    assert contents(run.with_name("tiny.replaced0")) == before
    assert resumed(run.parent, "tiny.replaced0").is_file()
    search(space, SearchOptions(run=run.with_name("tiny.replaced0"), progress=False))


def test_what_is_half_deleted_does_not_come_back(begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    space, run = begun
    real = shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        if "replaced" not in path.name:
            return real(path, **options)
        (path / "network.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny", "tiny.replaced0"]
    assert len(read_records(run).trials) == 1


def test_a_run_that_another_driver_begins_meanwhile_is_not_touched(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space, run = begun
    before, locks = contents(run), []
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        found = original(self, target)
        if self == run:
            other = RunStore(run)
            (run / "theirs").write_text("theirs")
            locks.append(other.lock())
            locks[-1].__enter__()
        return found

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="in use by another driver"):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    locks[-1].__exit__(None, None, None)
    assert contents(run) == {"theirs": b"theirs"}
    assert contents(run.with_name("tiny.replaced0")) == before
    assert "is still there as" in caplog.text


def test_a_link_is_not_deleted(begun: tuple[Space, Path]) -> None:
    space, run = begun
    link = run.with_name("link")
    link.symlink_to(run, target_is_directory=True)
    before = contents(run)
    with pytest.raises(UserError, match=r"link is a link to .*tiny; delete that by hand, nothing was deleted"):
        search(space, SearchOptions(run=link, progress=False, from_scratch=True))
    assert contents(run) == before


def test_a_storage_in_the_run_that_would_be_deleted_is_refused(begun: tuple[Space, Path]) -> None:
    space, run = begun
    for source in (str(run / "own.db"), f"sqlite:///{run / 'own.db'}"):
        with pytest.raises(UserError, match="which --from-scratch would delete; choose another --name"):
            search(space, SearchOptions(run=run, progress=False, from_scratch=True, source=source))


def test_a_wrong_source_leaves_nothing_behind(begun: tuple[Space, Path]) -> None:
    space, run = begun
    with pytest.raises(UserError, match="nowhere"):
        search(space, SearchOptions(run=run.with_name("new"), progress=False, source="nowhere"))
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]
    before = contents(run)
    more = parse_space({**SPACE, "search": SPACE["search"] | {"trials": 9}}, "tiny.yaml")
    with pytest.raises(UserError, match="has 1 trials already"):
        search(more, SearchOptions(run=run, progress=False, source="nowhere"))
    assert contents(run) == before


def test_a_trial_is_not_repeated_on_other_images(begun: tuple[Space, Path]) -> None:
    _, run = begun
    assert of_trial(f"{run}/t0001", None).config.data.name == "digits"
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    lines[0]["digests"]["train"] = "0" * 64
    (run / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=r"begun with other images: the train split had SHA-256 0{16}, digits has \w"):
        of_trial(f"{run}/t0001", None)


def test_a_study_without_digests_goes_on(begun: tuple[Space, Path]) -> None:
    space, run = begun
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    for key in ("digests", "init"):
        del lines[0][key]
    (run / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    search(space, SearchOptions(run=run, progress=False))
    assert of_trial(f"{run}/t0001", None).config.data.name == "digits"


def test_a_broken_space_is_named_when_its_run_is_opened(begun: tuple[Space, Path]) -> None:
    space, run = begun
    (run / "space.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"space\.yaml: line 1"):
        search(space, SearchOptions(run=run, progress=False))


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "nowhere"), ("itself", "which --from-scratch would delete; choose another --name")],
)
def test_a_run_is_not_deleted_for_one_that_cannot_begin(source: str, message: str, begun: tuple[Space, Path]) -> None:
    space, run = begun
    before = contents(run.parent)
    given = str(run) if source == "itself" else source
    with pytest.raises(UserError, match=message):
        search(space, SearchOptions(run=run, progress=False, from_scratch=True, source=given))
    assert contents(run.parent) == before


def test_a_run_that_fails_to_begin_brings_the_old_one_back(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = begun
    before = contents(run.parent)

    def full(*rest: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "begin", full)
        with pytest.raises(OSError, match="No space left"):
            search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert contents(run.parent) == before
    search(space, SearchOptions(run=run, progress=False, from_scratch=True))
    assert not (run / "network.safetensors").exists()
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]  # nothing stands aside any more


def test_a_study_goes_on_with_its_own_images_and_network_only(
    begun: tuple[Space, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = begun
    search(space, SearchOptions(run=run, progress=False))
    before = contents(run.parent)
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
    assert contents(run.parent) == before
