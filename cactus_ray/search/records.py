"""What is known of a run and of each of its trials: plain data, read back from ``trials.jsonl`` by ``reading``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cactus_ray.errors import UserError
from cactus_ray.search.halving import Decision
from cactus_ray.search.work import Work

if TYPE_CHECKING:  # records are also read where nothing else needs torch
    from cactus_ray.data import DataSet

COLUMNS = (
    "trial", "level", "method", "seed", "split", "samples", "standard_accuracy", "n_certified", "n_falsified",
    "n_unknown", "certified_accuracy", "bytes", "ideal_bits", "macs", "train_seconds", "verify_seconds", "on_front",
    "config_hash",
)  # fmt: skip


@dataclass(slots=True)
class TrialRecord:
    """What is known of one trial. ``status``: running, waiting (to be promoted), trained, completed, failed or stopped.

    Only a completed trial has ``points`` and ``metrics``. ``verdicts``: level -> index -> row of the record;
    ``dear``: level -> indices whose row is the last word of the dear stage; ``ledger``: seconds of verifiers by stage
    of the cascade, ``overhead`` and ``lost`` (to verifiers that died or hung) among them; ``losses``: chunk -> how
    many verifiers it was lost with; ``rungs``: what was decided about it, rung by rung; ``spared``: level ->
    [trial, level] of the point that beats all that dear verification could have brought; ``epoch_cost``: of an
    epoch for halving, in epochs of the study's reference; ``worked``: seconds of training in all (``search.work``);
    ``deaths``: furthest epoch -> how often the process that trained it died before the next one; ``gpus``: GPUs of a
    worker that it last trained on, where it had any; ``lacks``: how often it ran out of their memory beside others.
    A replicate repeats the configuration of the trial ``of`` as its ``replicate``-th seed (the trial itself is the
    first).
    ``again``: verdicts and points of the same network on samples that the search did not use; there ``refused``: level
    -> why there will be no points.
    """

    id: str
    number: int
    status: str = "running"
    parameters: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    seed: int = 0
    epoch_cost: float = 1.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    rungs: list[Decision] = field(default_factory=list)
    spared: dict[str, list[str]] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    train_seconds: float | None = None
    worked: float = 0.0
    deaths: dict[int, int] = field(default_factory=dict)
    checkpoint: str | None = None
    sha256: str | None = None
    verdicts: dict[str, dict[int, list[Any]]] = field(default_factory=dict)
    dear: dict[str, set[int]] = field(default_factory=dict)
    measures: dict[str, dict[str, int]] = field(default_factory=dict)
    verify_seconds: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    origin: str = "sampler"
    note: str | None = None
    gpus: float | None = None
    lacks: int = 0
    of: str | None = None
    replicate: int = 1
    refused: dict[str, str] = field(default_factory=dict)
    again: TrialRecord | None = None


@dataclass(slots=True)
class Records:
    """All records of a run, in the order of the file. ``damaged_lines``: lines that could not be read.

    ``past``: what was taken from other studies. ``drivers``: seconds between the first and the last event of each
    driver, or as many as it said it worked: time in which none worked is in none of them. ``packing``: how many trials
    share a GPU now, and why (``trials_per_gpu``); ``lowered``: to how many a lack of memory brought it down, if any.
    """

    study: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, TrialRecord] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    damaged_lines: int = 0
    past: list[dict[str, Any]] = field(default_factory=list)
    drivers: list[float] = field(default_factory=list)
    packing: dict[str, Any] = field(default_factory=dict)
    lowered: int | None = None
    _begun: float | None = field(default=None, repr=False, compare=False)
    work: Work = field(default_factory=Work, repr=False, compare=False)

    def points(self) -> list[dict[str, Any]]:
        """One row per (trial, level) of the completed trials that the search drew."""
        return [point for trial in self.drawn() if trial.status == "completed" for point in trial.points]

    def drawn(self) -> list[TrialRecord]:
        """The trials that the search drew: all but replicates."""
        return [trial for trial in self.trials.values() if trial.of is None]

    def replicates(self) -> list[TrialRecord]:
        """The trials that repeat one of the search with another seed."""
        return [trial for trial in self.trials.values() if trial.of is not None]

    def refuse_other_data(self, run: Path, data: DataSet, instead: str = "") -> None:
        """Raise UserError where ``data`` are not the images and labels that the study in the folder ``run`` was begun
        with, by whose indices its verdicts are kept. One of an older version names no digests, and is not compared.
        """
        for split, digest in self.study.get("digests", {}).items():
            if split in data.digests and data.digests[split] != digest:
                raise UserError(
                    f"{run}: begun with other images: the {split} split had SHA-256 {digest[:16]}, {data.name} has "
                    f"{data.digests[split][:16]} now; expected the same images under data.root{instead}"
                )

    def ledger(self) -> dict[str, float]:
        """Seconds of verifiers by stage, over all trials, whatever became of them."""
        total: dict[str, float] = {}
        for trial in self.trials.values():
            for stage, seconds in trial.ledger.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total
