"""Seeds of front members: who is trained again, when dominance is settled, and what the tables say of it. Pure.

The search compares one network per configuration. A point may then lead because of its seed alone, so the trials that
own front points are trained again under the same configuration with other seeds: replicates. They are estimates and no
candidates: their points are never on the front, and the sampler never hears of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from cactus_ray.search.objectives import Constraint, feasible
from cactus_ray.search.pareto import losses, non_dominated
from cactus_ray.search.records import Records

Point = Mapping[str, Any]
Curve = Mapping[str, Point]
"""The points of one network, by level."""
AHEAD, BEHIND, OPEN = "non-dominated", "dominated", "open"
CONFIDENCE = 0.95
ENDED = ("completed", "failed", "stopped")
SHOWN = ("certified_accuracy", "standard_accuracy")
FRESH = ("samples", "standard_accuracy", "n_certified", "n_falsified", "n_unknown", "certified_accuracy")


@dataclass(frozen=True, slots=True)
class Replicate:
    """The trial ``of``, again; ``number``: which seed of its configuration, from 2 on."""

    of: str
    number: int

    @property
    def id(self) -> str:
        return f"{self.of}-s{self.number}"


def replicate_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th network of a configuration whose first one had ``seed``: 31 bits of SHA-256."""
    digest = hashlib.sha256(f"replicate {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


def curves_by_seed(records: Records, below: int | None = None) -> dict[str, list[Curve]]:
    """The networks of every complete trial of the search: its own, then its complete replicates, by their numbers.

    ``below``: leave out replicates from this number on.
    """
    found: dict[str, list[Curve]] = {t.id: [_curve(t.points)] for t in records.drawn() if t.status == "completed"}
    for trial in sorted(records.replicates(), key=lambda t: t.replicate):
        if trial.status == "completed" and trial.of in found and (below is None or trial.replicate < below):
            found[trial.of].append(_curve(trial.points))
    return found


def _curve(points: Iterable[Point]) -> Curve:
    return {str(p["level"]): p for p in points}


# --- when dominance is settled -------------------------------------------------------------------------------------


class Standings:
    """Who dominates whom over seeds, beyond what seeds alone move.

    ``curves``: networks by trial (``curves_by_seed``), each with the same levels. Every column of ``front`` is compared
    by its mean over seeds, with Student's interval of the difference of two means (Student 1908; pooled variances:
    Welch 1938, with the fewer degrees of freedom, which is on the safe side). Variances over seeds are pooled over all
    trials with at least two, level by level; points of one trial are compared by their differences seed by seed. So a
    trial with one seed is a candidate like any other, with the wide interval of a single draw.

    Assumed: at a level, seeds move all configurations alike. Every comparison has ``confidence`` by itself, in each
    column; it is a rule for when to stop and no joint statement. Verdicts are of the same samples throughout, so the
    sampling of images is not in it (``fresh`` is about that). The seed that the search chose by is among the seeds, and
    what is left of its luck in the mean shrinks with their number. A column that did not vary is taken as constant.
    """

    def __init__(
        self, curves: Mapping[str, Sequence[Curve]], front: Mapping[str, str], confidence: float = CONFIDENCE
    ) -> None:
        self.trials = {trial: i for i, trial in enumerate(curves)}
        self.levels = {level: i for i, level in enumerate(next(iter(curves.values()))[0])} if curves else {}
        rows = [np.stack([_rows(curve, self.levels, front) for curve in seeds]) for seeds in curves.values()]
        self.counts = np.array([len(seeds) for seeds in rows])
        self.means = np.stack([seeds.mean(axis=0) for seeds in rows]) if rows else np.zeros((0, 0, len(front)))
        again = [seeds - seeds.mean(axis=0) for seeds in rows if len(seeds) > 1]
        self.residuals = np.concatenate(again) if again else np.zeros((0, *self.means.shape[1:]))
        self.freedom = int((self.counts - 1).sum())
        self.reach = float(special.stdtrit(self.freedom, (1 + confidence) / 2)) if self.freedom else np.inf

    def of(self, trial: str, level: str) -> str:
        """``dominated`` where some other point is at least as good in every column and better in one, each beyond the
        interval; ``non-dominated`` where every other is worse in some column beyond it, or the same in all without any
        variance; else ``open``. Without any replicate all is open."""
        if not self.freedom:
            return OPEN
        c, v = self.trials[trial], self.levels[level]
        gap = self.means - self.means[c, v]  # losses: a rival that is better has less
        single = self._variance(self.residuals)
        variance = single / self.counts[:, None, None] + single[v] / self.counts[c]
        variance[c] = self._variance(self.residuals - self.residuals[:, v : v + 1]) / self.counts[c]
        half = self.reach * np.sqrt(variance)
        others = np.ones(gap.shape[:2], dtype=bool)
        others[c, v] = False
        beats = (gap + half <= 0).all(axis=-1) & (gap + half < 0).any(axis=-1)
        if (beats & others).any():
            return BEHIND
        harmless = (gap - half > 0).any(axis=-1) | ((gap == 0) & (half == 0)).all(axis=-1)
        return AHEAD if harmless[others].all() else OPEN

    def _variance(self, residuals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray((residuals**2).sum(axis=0) / self.freedom, dtype=np.float64)


def _rows(curve: Curve, levels: Collection[str], front: Mapping[str, str]) -> npt.NDArray[np.float64]:
    return losses([curve[level] for level in levels], front)


# --- who is trained again ------------------------------------------------------------------------------------------


def fields(records: Records, front: Mapping[str, str], constraints: Sequence[Constraint]) -> list[list[Point]]:
    """The points among which there is a front: all of the search, and those of trials that keep all constraints."""
    everybody: list[list[Point]] = [list(records.points())]
    if constraints:
        met = {
            t.id for t in records.drawn()
            if t.status == "completed" and all(v <= 0 for v in feasible(t.metrics, constraints).values())
        }  # fmt: skip
        everybody.append([p for p in everybody[0] if p["trial"] in met])
    return everybody


def leading(points: Sequence[Point], front: Mapping[str, str]) -> list[tuple[str, str]]:
    """(trial, level) of the points on the front."""
    ahead = non_dominated(points, front)
    return [(p["trial"], p["level"]) for p, first in zip(points, ahead, strict=True) if first]


def due(records: Records, front: Mapping[str, str], constraints: Sequence[Constraint], seeds: int) -> list[Replicate]:
    """The replicates to start next, one seed for every front member that is not settled; none when all is done.

    A member is a trial with a point on a front (``fields``); it is settled once each of these points is ``dominated``
    or ``non-dominated`` in its field (``Standings``), or has ``seeds`` seeds. Round k starts the k-th seeds and is
    decided by seeds before the k-th alone, so the answer is the same whatever of the round has been started before:
    a driver that takes over asks for the rest. A replicate that failed has had its turn. While some of a round are
    missing or have not ended, no later round is looked at.
    """
    spaces = [(points, leading(points, front)) for points in fields(records, front, constraints)]
    open_ = list(dict.fromkeys(trial for _, ahead in spaces for trial, _ in ahead))
    known = {(t.of, t.replicate): t for t in records.replicates()}
    for number in range(2, seeds + 1):
        open_ = _unsettled(open_, curves_by_seed(records, number), spaces, front)
        wanted = [Replicate(trial, number) for trial in open_ if (trial, number) not in known]
        ended = all(known[t, number].status in ENDED for t in open_ if (t, number) in known)
        if wanted or not ended:
            return wanted
    return []


def _unsettled(
    members: Sequence[str],
    curves: Mapping[str, Sequence[Curve]],
    spaces: Sequence[tuple[Sequence[Point], Sequence[tuple[str, str]]]],
    front: Mapping[str, str],
) -> list[str]:
    """Those of the members with a point on the front of its field that is open. ``spaces``: fields and fronts."""
    found: set[str] = set()
    for points, ahead in spaces:
        inside = {p["trial"] for p in points}
        standings = Standings({trial: seeds for trial, seeds in curves.items() if trial in inside}, front)
        found |= {trial for trial, level in ahead if standings.of(trial, level) == OPEN}
    return [trial for trial in members if trial in found]


# --- what tables say -----------------------------------------------------------------------------------------------


def seen_again(records: Records, points: Sequence[Point], front: Mapping[str, str]) -> list[dict[str, Any]]:
    """Points with what was found out about them after the search; one that was not seen again is as it was.

    With replicates: ``seeds``, and mean, min and max over them of both accuracies and of the columns of ``front``; for
    a point of the front ``over_seeds``, its standing (``Standings.of``). On fresh samples: ``fresh_samples``,
    ``fresh_certified_accuracy`` and the like, of its own network; or ``fresh_error``, why there are none.
    """
    curves = curves_by_seed(records) if records.replicates() else {}
    standings = Standings(curves, front)
    columns = dict.fromkeys((*SHOWN, *front))
    rows = []
    for point in points:
        trial, level = point["trial"], point["level"]
        row = dict(point)
        if len(seeds := curves.get(trial, [])) > 1:
            row["seeds"] = len(seeds)
            for column in columns:
                values = [float(curve[level][column]) for curve in seeds]
                row |= {f"{column}_mean": float(np.mean(values))}
                row |= {f"{column}_min": min(values), f"{column}_max": max(values)}
            row |= {"over_seeds": standings.of(trial, level)} if point.get("on_front") else {}
        again = records.trials[trial].again
        fresh = next((p for p in again.points if p["level"] == level), None) if again is not None else None
        row |= {f"fresh_{column}": fresh[column] for column in FRESH} if fresh is not None else {}
        row |= {"fresh_error": again.refused[level]} if again is not None and level in again.refused else {}
        rows.append(row)
    return rows
