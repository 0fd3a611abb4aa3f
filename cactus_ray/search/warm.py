"""Warm start: completed trials of another run, or of an Optuna storage, told to the sampler as past trials.

They guide the search and are no trials of the study: they have no points, never reach its front and count against no
limit. What was taken is written into the records, so that a study can be resumed without the other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cactus_ray.config import to_dict
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.search.domains import run_keys
from cactus_ray.search.encoding import encoded, to_plain
from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.past import PastTrial, told
from cactus_ray.search.points import plain_points
from cactus_ray.search.reading import read_records
from cactus_ray.search.records import TrialRecord
from cactus_ray.search.sampler import quiet
from cactus_ray.search.space import Space, load_space

JOURNALS = (".log", ".journal", ".jsonl")
Past = dict[str, Any]


def past_of(source: str, study: str | None, space: Space, reference: Mapping[str, float]) -> Past:
    """The body of a ``past`` event: what of ``source`` fits ``space``, and why the rest does not.

    ``source``: folder of a run, or an Optuna storage: its URL, or a journal (``.log``, ``.journal``) or SQLite file;
    ``study``: its name there, where there are several. Raises UserError where nothing can be read or nothing fits.
    """
    folder = Path(source)
    if folder.is_dir():
        if study is not None:
            raise UserError(f"--from-study: got {study!r}; expected nothing, because {source} is the folder of a run")
        found, notes = _of_run(folder, space, reference)
    else:
        found, notes = _of_storage(source, study, space), []
    trials = [
        {"trial": name, "parameters": plain_points([t.values])[0], "objectives": list(t.objectives),
         "violations": t.violations}
        for name, t in found if isinstance(t, PastTrial)
    ]  # fmt: skip
    skipped = [{"trial": name, "why": why} for name, why in found if isinstance(why, str)]
    if not trials:
        why = f"the first of {len(skipped)}: {skipped[0]['trial']}: {skipped[0]['why']}" if skipped else "it has none"
        raise UserError(f"--from: got {source!r}; expected completed trials that fit this space ({why})")
    return {"source": source, "study": study, "trials": trials, "skipped": skipped, "notes": notes}


# --- another run of ours -------------------------------------------------------------------------------------------


def _of_run(
    run: Path, space: Space, reference: Mapping[str, float]
) -> tuple[list[tuple[str, PastTrial | str]], list[str]]:
    records, there = read_records(run), load_space(run / "space.yaml")
    notes = []
    for key, value in to_dict(space.verification).items():
        if (other := to_dict(there.verification).get(key)) != value:
            notes.append(f"verification.{key} is {other} there and {value} here, so certified accuracies differ by it")
    complete = [t for t in records.drawn() if t.status == "completed"]
    return [(t.id, _fitted(t, space, reference)) for t in complete], notes


def _fitted(trial: TrialRecord, space: Space, reference: Mapping[str, float]) -> PastTrial | str:
    """A trial in terms of ``space``, or why it is none. Metrics are worked out again from its points, because means
    and the hypervolume depend on the levels and on the reference."""
    there = _flat(trial.config)
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if space.is_active(parameter, values):
            if parameter.name not in there:
                return f"{parameter.name} has no value there"
            value = run_keys()[parameter.name].convert(there[parameter.name], parameter.name)
            if not parameter.domain.contains(value):
                return f"{parameter.name} = {value!r} is outside the domain here"
            values[parameter.name] = value
    try:
        here = _flat(space.configuration(values, 1).to_dict())
    except ConfigError as error:
        return str(error)
    for key in sorted({*here, *there} - {"seed", "data.root"}, key=lambda key: (key != "method", key)):
        if here.get(key) != there.get(key):
            return f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
    by_level = {point["level"]: point for point in trial.points}
    if missing := [level for level in space.levels if level not in by_level]:
        return f"level {missing[0]} was not measured"
    points = [by_level[level] for level in space.levels]
    metrics = trial_metrics(points, trial.train_seconds or 0.0, space.front, reference)
    return told(space, values, metrics) or "an objective or a constrained metric is not finite"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# --- Optuna's storages ---------------------------------------------------------------------------------------------


def open_storage(source: str) -> Any:
    """An Optuna storage by its URL, or a file: JSON lines of a journal, or SQLite. UserError if it is none."""
    try:
        with quiet():
            if "://" in source:
                return optuna.storages.RDBStorage(source)
            if not Path(source).is_file():
                raise UserError(f"{source}: expected the folder of a run, a file, or a URL such as sqlite:///study.db")
            if Path(source).suffix in JOURNALS:
                backend = optuna.storages.journal.JournalFileBackend(source)
                return optuna.storages.JournalStorage(backend)
            return optuna.storages.RDBStorage(f"sqlite:///{Path(source).resolve()}")
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy, its drivers and Optuna raise many kinds; all mean that this is no storage
        raise UserError(f"{source}: cannot be opened as an Optuna storage ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _of_storage(source: str, name: str | None, space: Space) -> list[tuple[str, PastTrial | str]]:
    storage = open_storage(source)
    names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
    if (name is None and len(names) != 1) or (name is not None and name not in names):
        raise UserError(f"--from-study: got {name!r}; expected the name of a study in {source}: {', '.join(names)}")
    with quiet():
        study = optuna.load_study(study_name=name or names[0], storage=storage)
    order = _order(study, space, source)
    complete: Iterable[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [(f"trial {t.number}", _taken(t, space, order)) for t in complete]


def _order(study: optuna.Study, space: Space, source: str) -> list[int]:
    """Place of each of our objectives among those of the study: by name where they have names, else by order."""
    names = study.metric_names or [o.metric for o in space.objectives]
    wanted = {o.metric: o.goal for o in space.objectives}
    goals = [d.name.lower() for d in study.directions]
    known = dict(zip(names, goals, strict=False))
    if len(names) != len(goals) or any(known.get(metric) != goal for metric, goal in wanted.items()):
        named = study.metric_names or ["(unnamed)"] * len(goals)
        there = ", ".join(f"{goal} {name}" for name, goal in zip(named, goals, strict=True))
        here = ", ".join(f"{goal} {metric}" for metric, goal in wanted.items())
        raise UserError(f"--from: the study in {source} has the objectives {there}; expected {here}")
    return [names.index(metric) for metric in wanted]


def _taken(trial: FrozenTrial, space: Space, order: list[int]) -> PastTrial | str:
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if space.is_active(parameter, values):
            if parameter.name not in trial.params:
                return f"{parameter.name} has no value there"
            values[parameter.name] = to_plain(parameter.domain, trial.params[parameter.name])
    try:
        encoded(space, values)
    except ValueError as error:
        return str(error)
    violations = {c.name: trial.constraints.get(c.name) for c in space.constraints}
    if unknown := [name for name, value in violations.items() if value is None]:
        return f"nothing is known of the constraint {unknown[0]}"
    found = {name: float(value) for name, value in violations.items() if value is not None}
    return PastTrial(values, tuple(float(trial.values[i]) for i in order), found)
