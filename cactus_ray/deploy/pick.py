"""Which point of a run meets the requirements, why that one, and what a little less would buy.

Everything here looks at figures of the selection split only. The choice is a pure function of the points and the
requirements: the test split is evaluated later, for the chosen network alone, and never leads to another choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cactus_ray.deploy.requirements import COLUMNS, PREFERENCES, Requirements, option, show, violation
from cactus_ray.errors import UserError

__all__ = ["Choice", "NothingFits", "Relaxation", "Requirements", "choose", "describe"]

Point = Mapping[str, Any]

_WORDS = {"bytes": "size", "certified_accuracy": "certified accuracy", "standard_accuracy": "standard accuracy"}


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The smallest change of one requirement that lets a better point through: its new value and that point."""

    key: str
    value: float
    point: Point
    gain: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen point and why.

    ``binding``: the requirement without which the preferred figure would gain most; None where no requirement limits
    it. ``slacks``: per requirement, the distance to its limit relative to the limit (>= 0). ``relaxations``: what one
    step of each requirement buys; a requirement that buys nothing is absent. ``gone``: points whose network was not
    kept, so that they were not considered, and ``gone_feasible`` of these meet every requirement.
    """

    point: Point
    requirements: Requirements
    considered: int
    feasible: int
    binding: str | None
    slacks: dict[str, float]
    relaxations: tuple[Relaxation, ...]
    gone: int = 0
    gone_feasible: int = 0

    def lines(self) -> list[str]:
        """The explanation, one sentence each."""
        preferred = PREFERENCES[self.requirements.prefer][0]
        found = [
            f"chosen: {describe(self.point)}",
            f"{self.feasible} of {self.considered} points {'whose network was kept ' if self.gone else ''}meet every "
            f"requirement{f' ({self.gone_feasible} of the {self.gone} others would)' if self.gone else ''}; "
            f"this one has the best {_WORDS[preferred]} (on the selection split)",
        ]
        if self.binding is not None:
            limit = self.requirements.limits()[self.binding]
            found.append(
                f"binding requirement: {option(self.binding)} {show(self.binding, limit)} "
                f"(here {show(self.binding, self.point[COLUMNS[self.binding]])}, slack {self.slacks[self.binding]:.1%})"
            )
        elif self.slacks:
            found.append("no requirement is binding: without them the choice would have the same preferred figure")
        found += [
            f"{option(r.key)} {show(r.key, r.value)} would buy {_WORDS[preferred]} "
            f"{_figure(preferred, r.point[preferred])} instead of {_figure(preferred, self.point[preferred])} "
            f"({r.point['trial']}, {r.point['level']})"
            for r in self.relaxations
        ]
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "point": dict(self.point), "requirements": self.requirements.to_json(), "considered": self.considered,
            "feasible": self.feasible, "gone": self.gone, "gone_feasible": self.gone_feasible,
            "binding": self.binding, "slacks": self.slacks,
            "relaxations": [
                {"requirement": r.key, "value": r.value, "gain": r.gain, "point": dict(r.point)}
                for r in self.relaxations
            ],
        }  # fmt: skip


class NothingFits(UserError):  # noqa: N818  # an answer, not a fault
    """No point meets every requirement; the command line ends with ``exit_status``.

    ``nearest``: the point with the smallest sum of relative violations (None where there is no point at all);
    ``violations``: that point's, by requirement; ``impossible``: requirements that no point meets even alone;
    ``blocking``: requirements that, dropped alone, leave a point that meets all others.
    """

    exit_status = 3

    def __init__(
        self, requirements: Requirements, nearest: Point | None, violations: dict[str, float],
        impossible: tuple[str, ...], blocking: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.requirements, self.nearest, self.violations = requirements, nearest, violations
        self.impossible, self.blocking = impossible, blocking
        super().__init__("\n".join(self._lines()))

    def _lines(self) -> list[str]:
        if self.nearest is None:
            return ["nothing fits: the run has no point of a complete trial"]
        limits = self.requirements.limits()
        missed = [
            f"{_WORDS[COLUMNS[key]]} {show(key, self.nearest[COLUMNS[key]])} where {option(key)} asks for "
            f"{show(key, limits[key])}"
            for key in self.violations
        ]
        lines = ["nothing fits the requirements", f"nearest miss: {describe(self.nearest)}: {'; '.join(missed)}"]
        lines += [f"{option(key)} {show(key, limits[key])} is met by no point, even alone" for key in self.impossible]
        if self.blocking:
            lines.append(f"blocking alone: {', '.join(option(k) for k in self.blocking)} (all others can be met)")
        elif not self.impossible:
            lines.append("each requirement is met by some point, but no requirement alone is what stands in the way")
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "requirements": self.requirements.to_json(), "nearest": self.nearest and dict(self.nearest),
            "violations": self.violations, "impossible": list(self.impossible), "blocking": list(self.blocking),
        }  # fmt: skip


def choose(points: Iterable[Point], requirements: Requirements, gone: Sequence[Point] = ()) -> Choice:
    """The best point by ``requirements.prefer`` among those that meet every requirement. Deterministic.

    ``points``: rows of points.csv of complete trials; those of another split than selection are left out. ``gone``: the
    same without a network, which are only counted. Raises NothingFits, and UserError for a trial or a level that the
    run does not have.
    """
    candidates = _candidates(list(points), requirements)
    limits = requirements.limits()
    fitting = sorted(_meeting(candidates, limits), key=lambda p: _rank(p, requirements.prefer))
    if not fitting:
        raise _nothing(candidates, requirements)
    best = fitting[0]
    preferred = PREFERENCES[requirements.prefer][0]
    gains, relaxations = {}, []
    for key in limits:
        others = _meeting(candidates, {k: v for k, v in limits.items() if k != key})
        better = [p for p in others if _gain(preferred, p, best) > 0]
        if not better:
            continue
        gains[key] = max(_gain(preferred, p, best) for p in better)
        step = min(better, key=lambda p: (violation(key, limits[key], p), *_rank(p, requirements.prefer)))
        relaxations.append(Relaxation(key, step[COLUMNS[key]], step, _gain(preferred, step, best)))
    slacks = {key: abs(violation(key, limit, best)) for key, limit in limits.items()}
    binding = max(gains, key=lambda k: (gains[k], -slacks[k])) if gains else None
    others = [p for p in gone if requirements.level in (None, p["level"])]
    return Choice(
        best, requirements, len(candidates), len(fitting), binding, slacks, tuple(relaxations),
        len(others), len(_meeting(others, limits)),
    )  # fmt: skip


def describe(point: Point) -> str:
    """One line: trial, level and the three figures."""
    return (
        f"{point['trial']} at {point['level']}: certified {point['certified_accuracy']:.4f}, "
        f"standard {point['standard_accuracy']:.4f}, {point['bytes']:,} bytes"
    )


def _figure(column: str, value: float) -> str:
    return f"{value:,.0f}" if column == "bytes" else f"{value:.4f}"


def _candidates(points: Sequence[Point], requirements: Requirements) -> list[Point]:
    found = [p for p in points if p.get("split", "selection") == "selection"]
    for column in ("trial", "level"):
        wanted = getattr(requirements, column)
        there = sorted({str(p[column]) for p in found})
        if wanted is not None and found and wanted not in there:
            raise UserError(f"--{column} {wanted}: no complete trial has it; one of {', '.join(there)}")
        found = [p for p in found if wanted is None or p[column] == wanted]
    return found


def _meeting(points: Iterable[Point], limits: Mapping[str, float]) -> list[Point]:
    return [p for p in points if all(violation(key, limit, p) <= 0 for key, limit in limits.items())]


def _gain(column: str, point: Point, than: Point) -> float:
    difference: float = point[column] - than[column]
    return -difference if column == "bytes" else difference


def _rank(point: Point, prefer: str) -> tuple[Any, ...]:
    figures = (point[c] if c == "bytes" else -point[c] for c in PREFERENCES[prefer])
    return (*figures, str(point["trial"]), str(point["level"]))


def _nothing(candidates: Sequence[Point], requirements: Requirements) -> NothingFits:
    limits = requirements.limits()
    if not candidates:
        return NothingFits(requirements, None, {}, (), ())

    def violations(point: Point) -> dict[str, float]:
        return {k: v for k, limit in limits.items() if not (v := violation(k, limit, point)) <= 0}

    nearest = min(candidates, key=lambda p: (math.fsum(violations(p).values()), *_rank(p, requirements.prefer)))
    impossible = tuple(k for k, limit in limits.items() if not _meeting(candidates, {k: limit}))
    blocking = tuple(k for k in limits if _meeting(candidates, {j: v for j, v in limits.items() if j != k}))
    return NothingFits(requirements, nearest, violations(nearest), impossible, blocking)
