"""Why a trial ended as it did, and why its points are not on the front. Pure: from records and a space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cactus_ray.errors import UserError
from cactus_ray.search.compared import last_rung
from cactus_ray.search.objectives import feasible
from cactus_ray.search.pareto import losses
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.replicates import seen_again
from cactus_ray.search.space import Space
from cactus_ray.search.store import with_front

Row = dict[str, Any]
_LATER, _SPREAD = ("seeds", "over_seeds", "fresh_"), ("_mean", "_min", "_max")
"""Columns of what was found out after the search."""


def explain(space: Space, records: Records, trial: str) -> Row:
    """What became of a trial, as plain data: ``status``, ``reason``, ``constraints`` (violation by name, more than 0 is
    not met), and per point ``on_front`` or the front's points that dominate it, with what they gain per column; with
    replicates and fresh samples what they say of it (``replicates.seen_again``). Points of a replicate stand beside
    those of the trial that it repeats. ``rung``, where it came to one: with whom it was compared (``compared``).

    Raises UserError for a trial that the run does not have.
    """
    record = records.trials.get(trial)
    if record is None:
        known = ", ".join(records.trials) if len(records.trials) <= 20 else f"{len(records.trials)} trials"
        raise UserError(f"TRIAL: got {trial!r}; expected a trial of this run: {known or 'it has none yet'}")
    found: Row = {
        "trial": trial, "status": record.status, "origin": record.origin, "note": record.note,
        "reason": _reason(record), "parameters": dict(record.parameters),
    } | _repeats(record)  # fmt: skip
    compared = last_rung(space, records, record)
    found |= {} if compared is None else {"rung": compared}
    if record.status != "completed":
        return found | {"constraints": {}, "points": []}
    points = seen_again(records, with_front(records, space.front), space.front)
    if record.of is not None:  # no candidate: beside its original
        originals = {p["level"]: p for p in points if p["trial"] == record.of}
        return found | {
            "constraints": {},
            "points": [_beside(p, originals[p["level"]], space.front) for p in record.points],
        }
    return found | {
        "constraints": feasible(record.metrics, space.constraints),
        "objectives": {o.metric: record.metrics.get(o.metric) for o in space.objectives},
        "points": [_point(p, points, space.front) for p in points if p["trial"] == trial],
    }


def _repeats(record: TrialRecord) -> Row:
    return {} if record.of is None else {"of": record.of, "replicate": record.replicate, "seed": record.seed}


def _beside(point: Mapping[str, Any], original: Mapping[str, Any], front: Mapping[str, str]) -> Row:
    values = {column: point[column] for column in front}
    return {"level": point["level"], **values, "original": {column: original[column] for column in front}}


def _reason(record: TrialRecord) -> str:
    epochs = max((int(e["epoch"]) for e in record.epochs), default=0)
    match record.status:
        case "failed":
            return f"failed after {epochs} epochs: {record.error or 'no reason recorded'}"
        case "stopped":
            return f"stopped after {epochs} epochs: {record.error or 'no reason recorded'}"
        case "waiting":
            return f"waits after {epochs} epochs to be among the best of its rung: {record.error or 'it was not'}"
        case "running":
            return f"training: {epochs} epochs so far, or its driver ended; it has no points yet"
        case "trained":
            seen = sum(len(rows) for rows in record.verdicts.values())
            return f"trained, verification is not complete ({seen} verdicts so far); it has no points yet"
    return "complete"


def _point(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> Row:
    """One point; of those that dominate it, the ones on the front, the closest one first."""
    found: Row = {"level": point["level"], "on_front": bool(point["on_front"]), "dominated_by": []}
    found |= {column: point[column] for column in front}
    found |= {column: point[column] for column in point if column.startswith(_LATER) or column.endswith(_SPREAD)}
    if point["on_front"]:
        return found
    leading = [p for p in points if p["on_front"]]
    mine, others = losses([point], front)[0], losses(leading, front)
    for other, row in zip(leading, others, strict=True):
        if (row <= mine).all() and (row < mine).any():
            gains = {c: other[c] - point[c] for c in front if other[c] != point[c]}
            found["dominated_by"].append({"trial": other["trial"], "level": other["level"], "gains": gains})
    found["dominated_by"].sort(key=lambda d: _distance(d["gains"], point))
    return found


def _distance(gains: Mapping[str, float], point: Mapping[str, Any]) -> float:
    return sum(abs(gain) / (abs(point[column]) or 1.0) for column, gain in gains.items())
