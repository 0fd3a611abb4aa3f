"""A run as an Optuna storage, for tools that read one: a copy that is made from the records and may be deleted."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import optuna

from cactus_ray.search.encoding import distributions, encoded
from cactus_ray.search.past import told
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.sampler import STATES, quiet
from cactus_ray.search.space import Space


def write_storage(space: Space, records: Records, file: Path) -> None:
    """Write all trials that ended into a new journal ``file``, as the study of the space's name.

    Objectives have their names, so that ``--from`` reads the file back; every other metric, the trial's name, its
    configuration hash and its error are user attributes. Trials that this space would not ask for are left out.
    """
    with quiet():
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
        goals = [o.goal for o in space.objectives]
        study = optuna.create_study(study_name=space.name, directions=goals, storage=storage)
        study.set_metric_names([o.metric for o in space.objectives])
        study.add_trials([t for r in records.drawn() if (t := _frozen(space, r)) is not None])


def _frozen(space: Space, record: TrialRecord) -> optuna.trial.FrozenTrial | None:
    found = told(space, {}, record.metrics) if record.status == "completed" else None
    if record.status not in STATES or (record.status == "completed" and found is None):
        return None
    try:
        params = encoded(space, record.parameters)
    except ValueError:
        return None
    about: dict[str, Any] = {"trial": record.id, "config_hash": record.config_hash, **record.metrics}
    trial = optuna.create_trial(
        state=STATES[record.status], params=params, distributions=distributions(space, params),
        values=found.objectives if found else None, constraints=found.violations if found else None,
        user_attrs=about | ({"error": record.error} if record.error else {}),
    )  # fmt: skip
    for name, stamp in (("datetime_start", record.started), ("datetime_complete", record.ended)):
        if stamp is not None:
            setattr(trial, name, datetime.datetime.fromtimestamp(stamp))
    return trial
