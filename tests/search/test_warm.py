"""Warm start: what fits is told, what does not is named, and the study resumes without the other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from course import MEASURES, REFERENCE, SPACE, begin, result, resume, started
from optuna.trial import TrialState

from cactus_ray.errors import UserError
from cactus_ray.search.optuna_file import write_storage
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import read_records
from cactus_ray.search.study import Study
from cactus_ray.search.warm import past_of

SIZE = MEASURES["bytes"]


def space(**changes: Any) -> Space:
    return parse_space({**SPACE, **changes}, "course.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete trials and a failed one."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "space.yaml").write_text(yaml.safe_dump(space().to_dict()))
    study = begin(space(), folder)
    for verdict in ("CERTIFIED", "FALSIFIED"):
        for chunk in study.trained(started(study).id, {"last": verdict.encode()}, "last", 1, 2.0):
            study.verified(result(chunk, verdict))
    study.failed(started(study).id, "no")
    return folder


def told(study: Study) -> list[Any]:
    return [t for t in study.sampler._study.trials if t.state == TrialState.COMPLETE]


def test_complete_trials_are_told_and_recorded(run: Path, tmp_path: Path) -> None:
    past = past_of(str(run), None, space(), REFERENCE)
    assert [row["trial"] for row in past["trials"]] == ["t0001", "t0002"]
    study = begin(space(), tmp_path)
    study.warm(past)
    assert [t.values for t in told(study)] == [[1.0, 1.0], [0.0, 1.0]]
    trial = started(study)
    assert (trial.id, trial.number) == ("t0001", 1)
    again = resume(space(), tmp_path)
    assert [t.values for t in told(again)] == [[1.0, 1.0], [0.0, 1.0]]
    records = read_records(tmp_path)
    assert records.points() == []
    assert list(records.trials) == ["t0001"]


def test_a_resumed_study_goes_on_as_one_that_was_not(run: Path, tmp_path: Path) -> None:
    tpe = space(search={"trials": 9, "sampler": "tpe"})
    study = begin(tpe, tmp_path)
    study.warm(past_of(str(run), None, tpe, REFERENCE))
    rates = [started(study).config.learning_rate for _ in range(2)]
    again = resume(tpe, tmp_path)
    assert [started(again).config.learning_rate for _ in range(2)] == rates
    assert started(again).config.learning_rate == started(study).config.learning_rate


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parameters": {"learning_rate": {"min": 0.5, "max": 0.6}}}, "learning_rate = .* is outside the domain"),
        ({"threat": {"epsilon": 0.2}}, "threat.epsilon is 0.1 there and 0.2 here"),
        ({"train": {"epochs": 3}}, "train.epochs is 30 there and 3 here"),
        ({"levels": ["dense", "int4"]}, "level int4 was not measured"),
        ({"parameters": {**SPACE["parameters"], "method": {"value": "ibp"}}}, "is 'cactus' there and 'ibp' here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(run: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=rf"the first of 2: t0001: .*{why}"):
        past_of(str(run), None, space(**change), REFERENCE)


def test_metrics_are_of_the_levels_that_are_searched_here(run: Path) -> None:
    fewer = space(levels=["int8"], objectives=[{"metric": "hypervolume"}])
    past = past_of(str(run), None, fewer, {"certified_accuracy": 0.0, "bytes": 4.0 * SIZE, "standard_accuracy": 0.0})
    assert past["trials"][0]["objectives"] == [pytest.approx(0.75)]


def test_another_verifier_is_said(run: Path) -> None:
    past = past_of(str(run), None, space(verification={"bound": "ibp"}), REFERENCE)
    assert past["notes"] == ["verification.bound is crown there and ibp here, so certified accuracies differ by it"]


# --- Optuna --------------------------------------------------------------------------------------------------------


def test_a_run_goes_to_optuna_and_comes_back(run: Path, tmp_path: Path) -> None:
    constrained = space(constraints=[{"metric": "standard_accuracy@int8", "min": 0.9}])
    file = tmp_path / "study.journal"
    write_storage(constrained, read_records(run), file)
    past = past_of(str(file), None, constrained, REFERENCE)
    assert [row["objectives"] for row in past["trials"]] == [[1.0, 1.0], [0.0, 1.0]]
    assert past["trials"][0]["violations"] == {"standard_accuracy@int8 >= 0.9": pytest.approx(-0.1)}
    original = past_of(str(run), None, constrained, REFERENCE)
    assert [row["parameters"] for row in past["trials"]] == [row["parameters"] for row in original["trials"]]


def test_a_study_in_sqlite_is_read_by_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    for name in ("one", "two"):
        study = optuna.create_study(study_name=name, directions=["maximize", "maximize"], storage=url)
        for rate in (0.005, 0.5):
            floats = optuna.distributions.FloatDistribution(0.001, 1.0)
            trial = {"params": {"learning_rate": rate}, "distributions": {"learning_rate": floats}}
            study.add_trial(optuna.create_trial(values=[0.5, 0.6], **trial))
    past = past_of(url, "two", space(), REFERENCE)
    assert [row["parameters"] for row in past["trials"]] == [{"learning_rate": 0.005}]
    assert past["skipped"] == [{"trial": "trial 1", "why": "learning_rate = 0.5 is not in this one"}]
    with pytest.raises(UserError, match=r"--from-study: got None; expected the name .*: one, two"):
        past_of(str(tmp_path / "own.db"), None, space(), REFERENCE)
    with pytest.raises(UserError, match=r"objectives maximize .*; expected maximize hypervolume"):
        past_of(url, "one", space(objectives=[{"metric": "hypervolume"}]), REFERENCE)
    with pytest.raises(UserError, match="nothing is known of the constraint"):
        past_of(url, "one", space(constraints=[{"metric": "bytes@int8", "max": 900}]), REFERENCE)


def test_what_is_no_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-file: expected the folder of a run"):
        past_of("no-such-file", None, space(), REFERENCE)
    (tmp_path / "text.db").write_text("This is no database. " * 100)
    with pytest.raises(UserError, match="cannot be opened as an Optuna storage"):
        past_of(str(tmp_path / "text.db"), None, space(), REFERENCE)
