"""Which networks of a run are kept: a long study would fill the disk with those that nobody will pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cactus_ray.search.objectives import Constraint, feasible
from cactus_ray.search.pareto import non_dominated
from cactus_ray.search.records import Records
from cactus_ray.search.store import with_front

VARIANTS = ("", ".best", ".last")


def prune_checkpoints(
    run: Path, records: Records, front: Mapping[str, str], constraints: Sequence[Constraint] = ()
) -> list[str]:
    """Delete the networks of trials that can no longer matter; returns the names of these trials.

    A trial matters while it is under way (its network is verified, or a later driver needs it) and while one of its
    points is on the front, or on that of the trials that keep all constraints. Points of complete trials stay for ever,
    so what is dominated once is dominated for good.
    ``cactus-ray train --trial`` makes any of them again.
    """
    leading = {point["trial"] for point in with_front(records, front) if point["on_front"]}
    if constraints:
        within = [p for p in records.points() if _keeps(records.trials[p["trial"]].metrics, constraints)]
        ahead = non_dominated(within, front)
        leading |= {point["trial"] for point, first in zip(within, ahead, strict=True) if first}
    pruned = []
    for trial in records.trials.values():
        if trial.status not in ("completed", "failed", "stopped") or trial.id in leading:
            continue
        files = [run / "checkpoints" / f"{trial.id}{variant}.safetensors" for variant in VARIANTS]
        present = [file for file in files if file.is_file()]
        for file in present:
            file.unlink()
        pruned += [trial.id] if present else []
    return pruned


def _keeps(metrics: Mapping[str, float] | None, constraints: Sequence[Constraint]) -> bool:
    return metrics is not None and all(violation <= 0 for violation in feasible(metrics, constraints).values())
