"""What every trial cost, stage by stage, in seconds of CPUs and GPUs as they were asked for; from the records alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cactus_ray.report.tables import Cell, Column
from cactus_ray.search.budget import cpu_seconds, gpu_seconds, train_seconds, training_on_gpus
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records, TrialRecord

TRAINING = "training"


@dataclass(frozen=True, slots=True)
class Spent:
    """``seconds`` of a trial's training or of a verifier at one stage, and what these took of CPUs and GPUs."""

    seconds: float
    cpu_seconds: float
    gpu_seconds: float


def ledger_of(space: Space, trial: TrialRecord) -> dict[str, Spent]:
    """By stage: ``training``, then those of verifiers (of the cascade, ``overhead``, and ``lost`` with verifiers that
    died). Trainings that were cut off or repeated count (``search.work``). The sum over all trials is what limits are
    held against.
    """
    asked, train = space.resources, train_seconds(trial)
    gpus = {} if trial.gpus is None else {trial.id: trial.gpus}
    on_gpus = training_on_gpus(asked, {trial.id: train}, gpus)
    found = (
        {} if not train else {TRAINING: Spent(train, cpu_seconds(asked, train, 0.0), gpu_seconds(asked, on_gpus, 0))}
    )
    for stage, seconds in trial.ledger.items():
        found[stage] = Spent(seconds, cpu_seconds(asked, 0.0, seconds), gpu_seconds(asked, 0.0, seconds))
    return found


def ledger_json(space: Space, trial: TrialRecord) -> dict[str, Any]:
    """``ledger_of`` as plain data."""
    return {stage: asdict(spent) for stage, spent in ledger_of(space, trial).items()}


def ledger_table(space: Space, records: Records) -> tuple[list[Column], list[list[Cell]]]:
    """A row per trial that cost anything: seconds by stage, then those of CPUs and, where there are any, of GPUs."""
    spent = {trial.id: ledger_of(space, trial) for trial in records.trials.values()}
    spent = {trial: stages for trial, stages in spent.items() if stages}
    stages = list(dict.fromkeys([TRAINING, *records.ledger()])) if spent else []
    on_gpus = any(s.gpu_seconds > 0 for by_stage in spent.values() for s in by_stage.values())
    columns = [Column("trial", True, "ascending"), *(Column(f"{stage} s") for stage in stages), Column("CPU s")]
    columns += [Column("GPU s")] if on_gpus else []
    rows = []
    for trial, by_stage in spent.items():
        values = [by_stage[stage].seconds if stage in by_stage else 0.0 for stage in stages]
        values.append(sum(s.cpu_seconds for s in by_stage.values()))
        values += [sum(s.gpu_seconds for s in by_stage.values())] if on_gpus else []
        rows.append([Cell(trial, trial, True), *(Cell(repr(float(v)), f"{v:.1f}") for v in values)])
    return columns, rows
