"""One batch on its way through the cascade: what is decided, what is known of the rest, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cactus_ray.bounds import alpha
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.verification.attack import sample_generators
from cactus_ray.verification.engine import Engine
from cactus_ray.verification.hints import Hint
from cactus_ray.verification.soundness import Batch, Model, ball_points, check_bounds, halving, proved, replays
from cactus_ray.verification.timing import book
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

CHECK_POINTS = 2
"""Random points, and corners, of every ball at which bounds are checked, beside the attack's best point."""


@dataclass(slots=True)
class Work:
    """A batch between stages. Positions count within the batch; stages decide some of them and leave others open.

    ``known``: points by index that may be counterexamples; ``hints``: what another level left, by index. ``bounds``:
    proved margin bounds [classes] by position; ``attacked``: the point with the smallest margin that is known, which is
    in ``margins``; ``fallen``: those with a counterexample.
    ``optimised``: what alpha left to branch and bound. ``costs``: seconds of the running stage that are one position's.
    """

    model: Model
    rounding: Rounding
    engine: Engine
    batch: Batch
    settings: VerificationSettings
    known: Mapping[int, Sequence[Tensor]]
    hints: Mapping[int, Hint]
    decided: dict[int, tuple[Verdict, str, Tensor | None]] = field(default_factory=dict)
    right: set[int] = field(default_factory=set)
    bounds: dict[int, Tensor] = field(default_factory=dict)
    attacked: dict[int, Tensor] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)
    fallen: set[int] = field(default_factory=set)
    optimised: list[tuple[list[int], alpha.Margins]] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seconds = [0.0] * len(self.batch)

    def open(self, position: int) -> bool:
        """Whether nothing is decided of it yet."""
        return position not in self.decided

    def decide(self, position: int, verdict: Verdict, by: str, point: Tensor | None = None) -> None:
        """The first decision counts."""
        if self.open(position):
            self.decided[position] = (verdict, by, point)

    def chosen(self, which: Callable[[int], bool]) -> list[int]:
        """Open positions that ``which`` holds of."""
        return [p for p in range(len(self.batch)) if self.open(p) and which(p)]

    def hinted(self, position: int) -> Hint:
        """What another level left of a position; empty where there is nothing."""
        return self.hints.get(self.batch.indices[position], Hint())

    def hint(self, position: int) -> Hint:
        """What this level leaves of a position."""
        verdict = self.decided.get(position, (Verdict.UNKNOWN, "", None))[0]
        nearest = self.attacked.get(position, self.hinted(position).nearest)
        return Hint(nearest, verdict is Verdict.CERTIFIED)

    def stage(self, stage: Callable[[Work, list[int]], None], positions: Sequence[int] | None = None) -> None:
        """Run one stage on the open (or given) positions, share out its time, and enforce the soft limit."""
        chosen = self.chosen(lambda p: True) if positions is None else list(positions)
        if not chosen:
            return
        started, self.costs = time.perf_counter(), {}
        for position in halving(lambda part: stage(self, part), chosen):
            self.decide(position, Verdict.UNKNOWN, "out_of_memory")
        seconds = time.perf_counter() - started
        book(stage.__name__, seconds)
        rest = seconds - sum(self.costs.values())
        for position in chosen:
            self.seconds[position] += rest / len(chosen) + self.costs.get(position, 0.0)
            if 0 < self.settings.seconds_per_sample <= self.seconds[position]:
                self.decide(position, Verdict.UNKNOWN, "time")

    def deadline(self, positions: Sequence[int], share: float = 1.0) -> float | None:
        """Value of ``time.perf_counter`` at which ``share`` of what the positions have left is used up, together."""
        limit = self.settings.seconds_per_sample
        left = sum(limit - self.seconds[p] for p in positions)
        return time.perf_counter() + share * left if limit > 0 else None

    def attacked_at(self, positions: Sequence[int], points: Tensor, margins: Tensor, by: str) -> None:
        """Decide what points [n, C, H, W] falsify, and keep those whose margins [n] are the smallest yet."""
        for position, point, margin in zip(positions, points, margins.tolist(), strict=True):
            if margin < self.margins.get(position, torch.inf):
                self.margins[position], self.attacked[position] = margin, point
        self.replay(positions, points, by)

    def replay(self, positions: Sequence[int], points: Tensor, by: str) -> None:
        """Decide what points [n, C, H, W] falsify, by evaluating them again."""
        hits = replays(self.model, self.batch.select(positions), points)
        for i in hits.nonzero()[:, 0].tolist():
            self.decide(positions[i], Verdict.FALSIFIED, by, points[i])
            self.attacked[positions[i]] = points[i]
            self.fallen.add(positions[i])

    def accept(self, engine: str, positions: Sequence[int], part: Batch, lower: Tensor) -> None:
        """Check margin bounds [n, classes] at points of the balls, keep them, and decide what they prove."""
        best = torch.stack([self.attacked.get(p, self.batch.images[p]) for p in positions])
        check_bounds(engine, self.model, part, lower, best)
        generators = sample_generators(self.settings.seed, part.indices, f"check {engine}")
        for points in ball_points(part, generators, CHECK_POINTS):
            check_bounds(engine, self.model, part, lower, points)
        for i, position in enumerate(positions):
            self.bounds[position] = lower[i]
        for i in proved(lower, part.labels).nonzero()[:, 0].tolist():
            self.decide(positions[i], Verdict.CERTIFIED, engine)

    def verdict(self, position: int) -> SampleVerdict:
        """What is said of a position; what is still open is UNKNOWN for want of better bounds."""
        verdict, by, point = self.decided.get(position, (Verdict.UNKNOWN, "bounds", None))
        lower = None
        if position in self.bounds and verdict is not Verdict.FALSIFIED:
            others = torch.arange(len(self.bounds[position]), device=self.model.device) != self.batch.labels[position]
            smallest = self.bounds[position][others].amin() if bool(others.any()) else torch.tensor(torch.inf)
            lower = float(smallest) if bool(torch.isfinite(smallest)) else None
        return SampleVerdict(
            index=self.batch.indices[position],
            label=int(self.batch.labels[position]),
            verdict=verdict,
            lower_bound=lower,
            decided_by=by,
            seconds=self.seconds[position],
            correct=position in self.right,
            counterexample=None if point is None else tuple(point.detach().cpu().flatten().tolist()),
        )
