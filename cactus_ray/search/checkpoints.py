"""Which networks of a run are kept: a long study would fill the disk with those that nobody will pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cactus_ray.search.objectives import Constraint, feasible
from cactus_ray.search.pareto import Front
from cactus_ray.search.records import Records

VARIANTS = ("", ".best", ".last")


class Leaders:
    """The complete trials that have a point on the front, or on that of the trials that keep all constraints.

    Points of complete trials stay for ever, so what is dominated once is dominated for good.
    """

    def __init__(self, front: Mapping[str, str], constraints: Sequence[Constraint] = ()) -> None:
        self.constraints = tuple(constraints)
        self.all = Front(front)
        self.within = Front(front)  # of the trials that keep all constraints; empty where there are none

    def add(self, trial: str, points: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> list[str]:
        """Take up a complete trial. The trials, this one among them, that lost or never had a place by it."""
        off = self.all.add(points)
        if self.constraints and all(v <= 0 for v in feasible(metrics, self.constraints).values()):
            off += self.within.add(points)
        leading = self.trials if off else set()
        return [name for name in dict.fromkeys(str(point["trial"]) for point in off) if name not in leading]

    @property
    def trials(self) -> set[str]:
        return {str(point["trial"]) for front in (self.all, self.within) for point in front.points}


def prune_checkpoints(
    run: Path, records: Records, front: Mapping[str, str], constraints: Sequence[Constraint] = ()
) -> list[str]:
    """Delete the networks of trials that can no longer matter; returns the names of these trials.

    A trial matters while it is under way (its network is verified, or a later driver needs it) and while it is one of
    the ``Leaders``. ``cactus-ray train --trial`` makes any of them again.
    """
    leaders = Leaders(front, constraints)
    for trial in records.drawn():
        if trial.status == "completed":
            leaders.add(trial.id, trial.points, trial.metrics)
    leading = leaders.trials
    ended = [t.id for t in records.trials.values() if t.status in ("completed", "failed", "stopped")]
    return [trial for trial in ended if trial not in leading and delete_networks(run, trial)]


def delete_networks(run: Path, trial: str) -> bool:
    """Delete all networks of a trial; whether there were any."""
    found = False
    for variant in VARIANTS:
        file = run / "checkpoints" / f"{trial}{variant}.safetensors"
        if file.is_file():
            file.unlink(missing_ok=True)
            found = True
    return found
