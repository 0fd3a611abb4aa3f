"""The largest certified radius of a sample, by bisection over a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

Confirm = Callable[[int, SampleVerdict], bool]
"""Whether a falsified verdict on the sample at a position holds for the deployed file."""


@dataclass(frozen=True, slots=True)
class SampleRadius:
    """What is known of one sample's robustness.

    ``certified``: a radius at which it is CERTIFIED, and one step of the grid further (or the largest radius) it was
    not; None where it is not certified even at radius 0. ``falsified``: the distance of the nearest counterexample that
    was found, 0 for a misclassified sample; None without any. So the robust radius is in [certified, falsified].
    """

    index: int
    label: int
    certified: float | None
    falsified: float | None
    seconds: float


@dataclass(slots=True)
class _Bracket:
    """Steps of the grid: ``low`` is certified (-1: nothing is), ``high`` is not (one more than the last: unknown)."""

    low: int
    high: int
    falsified: float | None = None
    seconds: float = 0.0

    @property
    def next(self) -> int | None:
        """The step to try: radius 0, then the middle; None where the bracket is closed."""
        if self.low < 0:
            return 0 if self.high > 0 else None
        return (self.low + self.high) // 2 if self.high - self.low > 1 else None


def largest_radii(
    graph: Graph,
    params: Params,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threat: ThreatConfig,
    settings: VerificationSettings,
    *,
    tolerance: float,
    confirm: Confirm | None = None,
) -> list[SampleRadius]:
    """Certified radii of images [N, C, H, W] up to ``threat.epsilon``, exact to ``tolerance`` (> 0, pixel units).

    Every radius of the grid is a multiple of ``epsilon / ceil(epsilon / tolerance)``; samples that are at the same one
    are verified together. A counterexample at some distance closes all radii from there on. ``seconds_per_sample``
    limits each radius. Raises as ``verify`` does.
    """
    steps = max(1, math.ceil(threat.epsilon / tolerance))
    brackets = [_Bracket(-1, steps + 1) for _ in indices]
    while waiting := _by_step(brackets):
        for step, positions in waiting.items():
            at = replace(threat, epsilon=threat.epsilon * step / steps)
            chosen = torch.tensor(positions)
            part = images[chosen], labels[chosen], [indices[p] for p in positions]
            for position, verdict in zip(positions, verify(graph, params, *part, at, settings), strict=True):
                true = verdict.verdict is not Verdict.FALSIFIED or confirm is None or confirm(position, verdict)
                _learn(brackets[position], step, verdict, images[position], threat.epsilon / steps, true)
    return [
        SampleRadius(
            int(indices[p]), int(labels[p]), threat.epsilon * b.low / steps if b.low >= 0 else None, b.falsified,
            b.seconds,
        )
        for p, b in enumerate(brackets)
    ]  # fmt: skip


def _by_step(brackets: list[_Bracket]) -> dict[int, list[int]]:
    """Positions that are still open, by the step that each tries next."""
    found: dict[int, list[int]] = {}
    for position, bracket in enumerate(brackets):
        if (step := bracket.next) is not None:
            found.setdefault(step, []).append(position)
    return dict(sorted(found.items()))


def _learn(bracket: _Bracket, step: int, verdict: SampleVerdict, image: Tensor, width: float, true: bool) -> None:
    """Takes a verdict at a step of the grid, ``width`` apart, into the bracket; ``true``: see Confirm."""
    bracket.seconds += verdict.seconds
    if verdict.verdict is Verdict.CERTIFIED:
        bracket.low = step
        return
    bracket.high = step
    if verdict.verdict is Verdict.FALSIFIED and true:
        distance = 0.0
        if verdict.counterexample is not None:
            point = torch.tensor(verdict.counterexample, dtype=torch.float64)
            distance = float((point - image.double().cpu().flatten()).abs().max())
        bracket.falsified = distance if bracket.falsified is None else min(distance, bracket.falsified)
        if width > 0:  # a hair more than the distance: the grid's own rounding
            bracket.high = min(step, max(bracket.low + 1, math.ceil(distance / width * (1 + 1e-9))))
