"""The events of ``trials.jsonl``, and what each adds to what is known of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cactus_ray.errors import UserError
from cactus_ray.search.faults import fault_of, fault_of_points, is_finite
from cactus_ray.search.halving import Decision
from cactus_ray.search.records import Records, TrialRecord

SCHEMA = 1
EVENTS = (
    "study", "started", "epoch", "rung", "trained", "verdicts", "lost", "spared", "completed", "failed", "stopped",
    "finished", "driver", "past", "begun", "died", "alive", "packing", "oom", "fresh", "reevaluated",
    "waiting",
)  # fmt: skip


def take(records: Records, event: dict[str, Any], file: Path) -> bool:
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
    if not is_finite(now):
        return
    begun = records._begun
    if event["event"] in ("study", "driver") or begun is None:
        begun = float(now)
        records.drivers.append(0.0)
    records.drivers[-1] = max(float(now) - begun, 0.0)
    records._begun = begun
    if event["event"] == "finished":
        records._begun = None
        if is_finite(event.get("seconds")):
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
    trial.again.refused |= {str(level): str(event.get("error")) for level in event.get("levels", ())}
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
