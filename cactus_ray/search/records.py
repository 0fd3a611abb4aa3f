"""What is known of a run, read back from the lines of ``trials.jsonl``.

The file is the only truth. A line that a killed driver tore is ignored and counted, and a trial is complete only with a
full, finite record; reading works while a driver writes.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from cactus_ray.errors import UserError
from cactus_ray.search.halving import Decision
from cactus_ray.search.work import Work

SCHEMA = 1
COLUMNS = (
    "trial", "level", "method", "seed", "split", "samples", "standard_accuracy", "n_certified", "n_falsified",
    "n_unknown", "certified_accuracy", "bytes", "ideal_bits", "macs", "train_seconds", "verify_seconds", "on_front",
    "config_hash",
)  # fmt: skip
EVENTS = (
    "study", "started", "epoch", "rung", "trained", "verdicts", "lost", "spared", "completed", "failed", "stopped",
    "finished", "driver", "past", "begun", "died", "alive", "packing", "oom", "fresh", "reevaluated",
    "waiting",
)  # fmt: skip
BLOCK = 256
_VERDICTS = b'{"event":"verdicts","trial":"'
_ENDS = tuple(b'{"event":"%s","trial":"' % kind for kind in (b"completed", b"failed", b"stopped"))
_TEXT = ("trial", "level", "method", "split", "config_hash")
_COUNTS = ("samples", "n_certified", "n_falsified", "n_unknown", "bytes", "ideal_bits", "macs")

logger = logging.getLogger(__name__)


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
    ``again``: verdicts and points of the same network on samples that the search did not use.
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

    def ledger(self) -> dict[str, float]:
        """Seconds of verifiers by stage, over all trials, whatever became of them."""
        total: dict[str, float] = {}
        for trial in self.trials.values():
            for stage, seconds in trial.ledger.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total


def read_records(run: str | Path, *, verdicts: bool = True) -> Records:
    """The records of a run, also while its driver writes. UserError if there is no run or a newer version wrote it.

    ``verdicts=False`` leaves out the rows of verdicts, and what they measured, of trials that have ended: nearly all of
    a long run's file, and nothing that a search or its report reads again. What they cost is in the ledger either way.
    """
    file = Path(run) / "trials.jsonl"
    records = Records()
    try:
        with file.open("rb") as lines:
            ended: set[bytes] = set() if verdicts else _ended(lines)
            lines.seek(0)
            for number, event in _events(lines, ended):
                if event is None or not _take(records, event, file):
                    records.damaged_lines += 1
                    logger.warning("%s: line %d is not a whole record and is ignored", file, number)
    except OSError as error:
        raise UserError(f"{run}: no run here ({file.name}: {error.strerror}); expected a folder of runs/") from None
    return records


def _events(lines: Iterable[bytes], ended: Container[bytes]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Events with the numbers of their lines; None for a line that is no event. Blank lines are passed over.

    Many lines are parsed as one array, in which equal keys are one object: it is faster and takes half the memory.
    """
    numbered = ((number, _without_rows(line, ended)) for number, line in enumerate(lines, 1) if line.strip())
    while block := list(itertools.islice(numbered, BLOCK)):
        try:
            found = json.loads(b"[" + b",".join(line for _, line in block) + b"]")
        except ValueError:
            found = []
        if len(found) != len(block):  # torn, or not UTF-8
            found = [_parsed(line) for _, line in block]
        for (number, _), event in zip(block, found, strict=True):
            yield number, event if isinstance(event, dict) and event.get("event") in EVENTS else None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _ended(lines: Iterable[bytes]) -> set[bytes]:
    """Names of the trials that have ended, as they stand in the lines."""
    whole = (_parsed(line) for line in lines if line.startswith(_ENDS))
    return {str(event["trial"]).encode() for event in whole if event is not None and "trial" in event}


def _without_rows(line: bytes, ended: Container[bytes]) -> bytes:
    """A line without its verdicts, if the trial has ended; all other lines as they are."""
    if line.startswith(_VERDICTS) and (trial := line[len(_VERDICTS) :].partition(b'"')[0]) in ended:
        _, _, rest = line.rpartition(b',"ledger":{')
        if len(rest) < len(line):  # not from before there was a ledger
            return _VERDICTS + trial + b'","levels":{},"ledger":{' + rest
    return line


def _take(records: Records, event: dict[str, Any], file: Path) -> bool:
    """Add one event; False if it does not fit what is known."""
    _clock(records, event)
    fits = _apply(records, event, file)
    if fits:
        for trial, seconds in records.work.event(event).items():
            records.trials[trial].worked += seconds
    return fits


def _apply(records: Records, event: dict[str, Any], file: Path) -> bool:
    kind = event["event"]
    if kind == "study":
        if event.get("schema") != SCHEMA:
            raise UserError(f"{file}: records of schema {event.get('schema')!r}; this version reads {SCHEMA}")
        records.study = event
    elif kind == "finished":
        records.finished = event
    else:
        records.finished = None  # something happened after the end: the run was resumed
        if kind in ("driver", "alive"):
            return True
        if kind == "past":
            records.past.append(event)
            return isinstance(event.get("trials"), list)
        if kind in ("packing", "oom"):
            return _packing(records, event)
        if kind == "started":
            return _start(records, event)
        trial = records.trials.get(event.get("trial", ""))
        if trial is None:
            return False
        return _TAKERS[kind](trial, event)
    return True


def _clock(records: Records, event: Mapping[str, Any]) -> None:
    """Follow how long drivers worked. A driver that was killed has no last word: its last event counts."""
    now = event.get("time")
    if not _finite(now):
        return
    begun = records._begun
    if event["event"] in ("study", "driver") or begun is None:
        begun = float(now)
        records.drivers.append(0.0)
    records.drivers[-1] = max(float(now) - begun, 0.0)
    records._begun = begun
    if event["event"] == "finished":
        records._begun = None
        if _finite(event.get("seconds")):
            records.drivers[-1] = max(records.drivers[-1], float(event["seconds"]))


def _packing(records: Records, event: dict[str, Any]) -> bool:
    """How many trials share a GPU from here on; "oom" because one of them, which is queued again, ran out of memory."""
    number = event.get("trials_per_gpu")
    if (
        not isinstance(number, int)
        or number < 1
        or (event["event"] == "oom" and event.get("trial") not in records.trials)
    ):
        return False
    records.packing = event
    if event["event"] == "oom":
        records.lowered = number
        records.trials[event["trial"]].lacks += 1
    return True


def _start(records: Records, event: dict[str, Any]) -> bool:
    trial, number = event.get("trial"), event.get("number")
    if not isinstance(trial, str) or not isinstance(number, int):
        return False
    keys = ("parameters", "config", "config_hash", "seed", "epoch_cost", "origin", "note", "of", "replicate")
    known = {key: event[key] for key in keys if key in event}
    records.trials[trial] = TrialRecord(trial, number, started=event.get("time"), **known)
    return True


def _epoch(trial: TrialRecord, event: dict[str, Any]) -> bool:
    trial.epochs = [e for e in trial.epochs if e.get("epoch") != event.get("epoch")] + [event]
    trial.gpus = event.get("gpus", trial.gpus)
    return True


def _noted(trial: TrialRecord, event: dict[str, Any]) -> bool:
    return True  # for ``work``, and for whoever reads the file


def _died(trial: TrialRecord, event: dict[str, Any]) -> bool:
    epoch = event.get("epoch")
    if not isinstance(epoch, int):
        return False
    trial.deaths[epoch] = trial.deaths.get(epoch, 0) + 1
    return True


def _rung(trial: TrialRecord, event: dict[str, Any]) -> bool:
    try:
        decision = Decision.of_event(event)
    except (KeyError, TypeError, ValueError):
        return False
    before = [d for d in trial.rungs if (d.rung, d.promoted) != (decision.rung, decision.promoted)]
    trial.rungs = [*before, decision]
    if decision.promoted and trial.status == "waiting":
        trial.status, trial.error = "running", None
    return True


def _waiting(trial: TrialRecord, event: dict[str, Any]) -> bool:
    trial.status, trial.error = "waiting", event.get("reason")
    if event.get("train_seconds") is not None:
        trial.train_seconds = event["train_seconds"]
    return True


def _spared(trial: TrialRecord, event: dict[str, Any]) -> bool:
    trial.spared.update(event.get("levels", {}))
    return True


def _trained(trial: TrialRecord, event: dict[str, Any]) -> bool:
    if trial.sha256 != event.get("sha256"):  # verdicts are of another network; what they cost stays spent
        trial.verdicts, trial.dear, trial.measures, trial.verify_seconds, trial.losses = {}, {}, {}, {}, {}
    trial.status = "trained"
    trial.checkpoint, trial.sha256 = event.get("checkpoint"), event.get("sha256")
    trial.train_seconds = event.get("train_seconds")
    trial.spared = {}  # what is spared is worked out from verdicts, after the training
    return True


def _verdicts(trial: TrialRecord, event: dict[str, Any]) -> bool:
    levels = _level_results(event)
    if levels is None:
        return False
    all_seconds = 0.0
    for level, found in levels.items():
        trial.verdicts.setdefault(level, {}).update({row[0]: row for row in found["samples"]})
        if event.get("stage", "dear") == "dear":
            trial.dear.setdefault(level, set()).update(row[0] for row in found["samples"])
        if found.get("measures"):
            trial.measures[level] = found["measures"]
        seconds = float(found.get("seconds") or 0.0)
        trial.verify_seconds[level] = trial.verify_seconds.get(level, 0.0) + seconds
        all_seconds += seconds
    _spend(trial, event.get("ledger", {"verification": all_seconds}))
    return True


def _level_results(event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an event says of each level; None if it does not fit.

    Before there were stages an event told of one level, and every verdict was the last word.
    """
    levels = {event["level"]: event} if "level" in event else event.get("levels")
    fits = isinstance(levels, Mapping) and all(
        isinstance(level, str) and isinstance(found, Mapping) and isinstance(found.get("samples"), list)
        for level, found in levels.items()
    )
    return levels if fits else None


def _fresh(trial: TrialRecord, event: dict[str, Any]) -> bool:
    """Verdicts on other samples: never among those of the search, but they cost as much."""
    trial.again = trial.again or TrialRecord(trial.id, trial.number)
    if not _verdicts(trial.again, event):
        return False
    _spend(trial, event.get("ledger", {}))
    return True


def _reevaluated(trial: TrialRecord, event: dict[str, Any]) -> bool:
    trial.again = trial.again or TrialRecord(trial.id, trial.number)
    if fault_of_points(event):
        return False
    trial.again.error = event.get("error")
    new = {point["level"]: point for point in event["points"]}
    trial.again.points = [p for p in trial.again.points if p["level"] not in new] + list(new.values())
    return True


def _lost(trial: TrialRecord, event: dict[str, Any]) -> bool:
    chunk = str(event.get("chunk"))
    trial.losses[chunk] = trial.losses.get(chunk, 0) + 1
    _spend(trial, {"lost": event.get("seconds")})
    return True


def _spend(trial: TrialRecord, ledger: Mapping[str, Any]) -> None:
    for stage, seconds in ledger.items():
        trial.ledger[stage] = trial.ledger.get(stage, 0.0) + float(seconds or 0.0)


def _completed(trial: TrialRecord, event: dict[str, Any]) -> bool:
    fault = fault_of(event)
    if fault is None:
        trial.status, trial.points, trial.metrics, trial.error = "completed", event["points"], event["metrics"], None
    else:
        trial.status, trial.error = "failed", f"its record is not complete: {fault}"
        trial.points, trial.metrics = [], {}
    trial.ended = event.get("time")
    return True


def _failed(trial: TrialRecord, event: dict[str, Any]) -> bool:
    trial.status, trial.ended = event["event"], event.get("time")
    trial.points, trial.metrics = [], {}
    trial.error = event.get("error") or event.get("reason")
    if event.get("train_seconds") is not None:
        trial.train_seconds = event["train_seconds"]
    return True


_TAKERS = {
    "begun": _noted, "died": _died, "epoch": _epoch, "rung": _rung, "trained": _trained, "verdicts": _verdicts,
    "lost": _lost, "spared": _spared, "completed": _completed, "failed": _failed, "stopped": _failed,
    "fresh": _fresh, "reevaluated": _reevaluated, "waiting": _waiting,
}  # fmt: skip


def fault_of(event: Mapping[str, Any]) -> str | None:
    """Why a ``completed`` event is no full, finite record of a trial; None if it is one."""
    points, metrics = event.get("points"), event.get("metrics")
    if not isinstance(points, Sequence) or not points or not isinstance(metrics, Mapping) or not metrics:
        return "no points or no metrics"
    for name, value in metrics.items():
        if not _finite(value):
            return f"metric {name} is {value!r}"
    return fault_of_points(event)


def fault_of_points(event: Mapping[str, Any]) -> str | None:
    """Why the points of an event are not what points have to be; None if they are, also where there are none."""
    points = event.get("points")
    if not isinstance(points, Sequence):
        return "no points"
    for point in points:
        if fault := _point_fault(point, event.get("trial")):
            return f"point {point.get('level')!r}: {fault}"
    levels = [point["level"] for point in points]
    return None if len(set(levels)) == len(levels) else f"a level twice among {levels}"


def _point_fault(point: Mapping[str, Any], trial: Any) -> str | None:
    for column in COLUMNS:
        if column != "on_front" and column not in point:
            return f"no {column}"
    for column, value in point.items():
        if column in _TEXT and not isinstance(value, str):
            return f"{column} is {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{column} is {value!r}"
        if column in _COUNTS and (type(value) is not int or value < 0):
            return f"{column} is {value!r}, no count"
        if column in ("standard_accuracy", "certified_accuracy") and not (_finite(value) and 0 <= value <= 1):
            return f"{column} is {value!r}, no fraction"
        if column in ("train_seconds", "verify_seconds") and not _finite(value):
            return f"{column} is {value!r}"
    if point["trial"] != trial:
        return f"it belongs to trial {point['trial']}"
    if point["n_certified"] + point["n_falsified"] + point["n_unknown"] != point["samples"] or not point["samples"]:
        return "its verdicts do not add up to its samples"
    if abs(point["certified_accuracy"] - point["n_certified"] / point["samples"]) > 1e-9:
        return "its certified accuracy is not n_certified / samples"
    return None


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
