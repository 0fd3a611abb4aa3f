"""By which rules trials are compared at the rungs of successive halving (``halving``), and what is decided there."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cactus_ray.search.objectives import Constraint
from cactus_ray.search.pareto import GOALS
from cactus_ray.search.ranking import RANKINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What trials are compared by, and where. ``goals``: metric -> "maximize" | "minimize".

    ``constraints``: on what is reported, as it is at a rung; those of a study are about its end, and not among them.
    ``first``: resource of the lowest rung; ``promote``: trials wait where they would be stopped; ``rest``: with nothing
    left to begin, those that wait go on, best first, whatever their share. Raises ValueError for anything that makes no
    sense.
    """

    goals: Mapping[str, str]
    constraints: tuple[Constraint, ...] = ()
    reduction: float = 3.0
    first: float = 1.0
    ranking: str = "hypervolume"
    promote: bool = False
    rest: bool = False

    def __post_init__(self) -> None:
        if not self.goals:
            raise ValueError("no metric to compare trials by; expected at least one")
        for metric, goal in self.goals.items():
            if goal not in GOALS:
                raise ValueError(f"goal of {metric} is {goal!r}; expected one of {', '.join(GOALS)}")
        if not (math.isfinite(self.reduction) and self.reduction > 1):
            raise ValueError(f"reduction is {self.reduction!r}; expected a finite number above 1")
        if not (math.isfinite(self.first) and self.first > 0):
            raise ValueError(f"the first rung is at {self.first!r}; expected a finite number above 0")
        for constraint in self.constraints:
            ends = [end for end in (constraint.min, constraint.max) if end is not None]
            if not (ends and ends[0] <= ends[-1]):  # nor NaN
                raise ValueError(f"constraint on {constraint.metric}: got {constraint}; expected min <= max, or one")
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking is {self.ranking!r}; expected one of {', '.join(RANKINGS)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that a report is read for."""
        return tuple(dict.fromkeys([*self.goals, *(c.metric for c in self.constraints)]))

    def share(self, count: int) -> int:
        """How many of so many trials at a rung are its best share."""
        return int(count / self.reduction + 1e-9)

    @property
    def least(self) -> int:
        """How many of a rung go on at the end of a search whatever their share: of so many, one would be chosen."""
        return math.ceil(self.reduction * (1 - 1e-9))

    def rung(self, resource: float) -> float | None:
        """The highest rung that ``resource`` has reached, as a resource; None below the first."""
        if not resource >= self.first * (1 - 1e-9):
            return None
        rung = float(self.first)
        while resource >= rung * self.reduction * (1 - 1e-9):  # epochs times a cost are hardly ever exact
            rung *= self.reduction
        return rung


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a trial at a rung: it was ``rank``-th (from 1) ``of`` so many, and ``go_on`` or not.

    ``values``: what was reported, None for what was missing or not finite. ``front``: its non-dominated front from 0,
    None where it was not compared by objectives. ``of`` numbers the reports to a rung. ``promoted``: it had waited.
    """

    trial: str
    rung: float
    resource: float
    progress: float
    values: Mapping[str, float | None]
    front: int | None
    rank: int
    of: int
    go_on: bool
    promoted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, which ``of_event`` reads back."""
        return {name: getattr(self, name) for name in self.__slots__} | {"values": dict(self.values)}

    @staticmethod
    def of_event(event: Mapping[str, Any]) -> Decision:
        """The decision in plain data that may hold more; KeyError, TypeError or ValueError where it does not fit."""
        front = event["front"]
        return Decision(
            str(event["trial"]), float(event["rung"]), float(event["resource"]), float(event["progress"]),
            {str(name): finite_or_none(value) for name, value in dict(event["values"]).items()},
            None if front is None else int(front), int(event["rank"]), int(event["of"]), bool(event["go_on"]),
            bool(event.get("promoted", False)),
        )  # fmt: skip

    @property
    def reason(self) -> str:
        """The decision in words."""
        return f"{self.rank} of {self.of} at rung {self.rung:g}"


def rung_order(decision: Decision) -> tuple[float, int, bool, int]:
    """Rung by rung in the order of reports; who was promoted after so many comes behind the last one, best first."""
    return decision.rung, decision.of, decision.promoted, decision.rank if decision.promoted else 0


def finite_or_none(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if real and math.isfinite(value) else None
