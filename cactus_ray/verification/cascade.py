"""The verdict cascade: clean prediction, attacks, interval bounds, linear bounds, branch and bound, else UNKNOWN.

Cheap stages see all samples before dear ones see any, and only samples that are still open go on. Every sample is
attacked before anything is proved of it; every bound is compared with the margins at the points that are known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cactus_ray.bounds import alpha, interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import UserError
from cactus_ray.verification.attack import attack, sample_generators
from cactus_ray.verification.branch import DEFAULT_SECONDS, Budget, branch
from cactus_ray.verification.engine import Engine, bind
from cactus_ray.verification.soundness import (
    Batch,
    Model,
    SoundnessError,
    ball_points,
    check_bounds,
    exact_arithmetic,
    halving,
    proved,
    replays,
)
from cactus_ray.verification.timing import book
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

__all__ = ["SoundnessError", "VerificationSettings", "verify"]

CHECK_POINTS = 2
"""Random points, and corners, of every ball at which bounds are checked, beside the attack's best point."""


def verify(
    graph: Graph,
    params: Params,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threat: ThreatConfig,
    settings: VerificationSettings,
    *,
    known: Mapping[int, Sequence[Tensor]] | None = None,
    radii: Params | None = None,
) -> list[SampleVerdict]:
    """Verdicts on images [N, C, H, W] (float32, inside the domain) in their order.

    ``params`` are the float32 tensors that are deployed, on the device that does the work. ``indices`` number the
    samples in their split; random numbers depend on (settings.seed, index) only, so verdicts do not depend on how
    samples are divided into calls or batches (but for time limits, and rounding of batched float32 attacks).
    ``known``: images by index that may be counterexamples, e.g. of another level of the same network; tried first.
    ``radii`` (float64, see ``Rounding.of``): CERTIFIED holds for every network whose weights are that close.

    CERTIFIED in ``settings.arithmetic``, by bounds in float64 whose own rounding our own engine charges; a
    misclassified sample is FALSIFIED by itself; other counterexamples replay in float32 and float64. Time-out, lack of
    memory and NaN are UNKNOWN. Raises UserError for images that do not fit the network or the domain and for an engine
    that is not installed, SoundnessError where a bound is contradicted.
    """
    _check_input(graph, images, labels, indices, threat)
    model = Model.of(graph, params)
    rounding = Rounding.of(graph, model.double, settings.arithmetic, radii)
    engine = bind(settings.engine, graph, model.double, rounding)
    verdicts: list[SampleVerdict] = []
    with exact_arithmetic(model.device):
        for start in range(0, len(indices), settings.batch_size):
            stop = min(start + settings.batch_size, len(indices))
            part = images[start:stop].to(model.device), labels[start:stop].to(model.device), indices[start:stop]
            work = _Work(model, rounding, engine, Batch.of(*part, threat.epsilon, threat.domain), settings, known or {})
            verdicts += work.run()
    return verdicts


def _check_input(graph: Graph, images: Tensor, labels: Tensor, indices: Sequence[int], threat: ThreatConfig) -> None:
    if images.dtype != torch.float32 or tuple(images.shape[1:]) != graph.input_shape:
        raise UserError(
            f"images: got {images.dtype} {tuple(images.shape)}; expected float32 (N, *{graph.input_shape}), the "
            "network's input"
        )
    if not len(images) == len(labels) == len(indices):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels, {len(indices)} indices; expected as many of each"
        )
    low, high = threat.domain
    outside = ~((images.double() >= low) & (images.double() <= high)).flatten(1).all(1)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise UserError(
            f"image {indices[first]}: pixels from {float(images[first].min())!r} to {float(images[first].max())!r}; "
            f"expected numbers inside threat.domain {list(threat.domain)}"
        )


@dataclass(slots=True)
class _Work:
    """One batch on its way through the stages. Positions count within the batch."""

    model: Model
    rounding: Rounding
    engine: Engine
    batch: Batch
    settings: VerificationSettings
    known: Mapping[int, Sequence[Tensor]]
    decided: dict[int, tuple[Verdict, str, Tensor | None]] = field(default_factory=dict)
    right: set[int] = field(default_factory=set)
    bounds: dict[int, Tensor] = field(default_factory=dict)
    attacked: dict[int, Tensor] = field(default_factory=dict)
    fallen: set[int] = field(default_factory=set)
    optimised: list[tuple[list[int], alpha.Margins]] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def run(self) -> list[SampleVerdict]:
        self.seconds = [0.0] * len(self.batch)
        self._stage(self._clean)
        self._stage(self._known)
        self._stage(self._quick_attack)
        # also samples that the attack falsified: a bound that "proves" one of them must not stay unseen
        self._stage(self._interval, [p for p in range(len(self.batch)) if self.open(p) or p in self.fallen])
        self._stage(self._full_attack)
        if self.settings.bound in ("crown", "alpha", "branch"):
            self._stage(self._linear)
        if self.settings.bound in ("alpha", "branch"):
            self._stage(self._alpha)
        if self.settings.bound == "branch":
            self._stage(self._branch)
        return [self._verdict(p) for p in range(len(self.batch))]

    def open(self, position: int) -> bool:
        return position not in self.decided

    def decide(self, position: int, verdict: Verdict, by: str, point: Tensor | None = None) -> None:
        if self.open(position):
            self.decided[position] = (verdict, by, point)

    def _stage(self, stage: Callable[[list[int]], None], positions: list[int] | None = None) -> None:
        """Run one stage on the open (or given) positions, share out its time, and enforce the soft limit."""
        if positions is None:
            positions = [p for p in range(len(self.batch)) if self.open(p)]
        if not positions:
            return
        started, self.costs = time.perf_counter(), {}
        for position in halving(stage, positions):
            self.decide(position, Verdict.UNKNOWN, "out_of_memory")
        seconds = time.perf_counter() - started
        book(stage.__name__, seconds)
        rest = seconds - sum(self.costs.values())
        for position in positions:
            self.seconds[position] += rest / len(positions) + self.costs.get(position, 0.0)
            if 0 < self.settings.seconds_per_sample <= self.seconds[position]:
                self.decide(position, Verdict.UNKNOWN, "time")

    # --- stages: each decides positions or leaves them open ---------------------------------------------------------

    def _clean(self, positions: list[int]) -> None:
        part = self.batch.select(positions)
        with torch.no_grad():
            logits = forward(self.model.graph, self.model.single, part.images)
        finite = torch.isfinite(logits).all(1) & self.model.finite
        right = logits.argmax(1) == part.labels
        for i, position in enumerate(positions):
            if bool(right[i]) and bool(torch.isfinite(logits[i]).all()):
                self.right.add(position)
            if not bool(finite[i]):
                self.decide(position, Verdict.UNKNOWN, "non_finite")
            elif not bool(right[i]):
                self.decide(position, Verdict.FALSIFIED, "clean", part.images[i])

    def _known(self, positions: list[int]) -> None:
        for position in positions:
            for image in self.known.get(self.batch.indices[position], ()):
                self._replay([position], image.to(self.batch.images).view_as(self.batch.images[:1]), "known")

    def _quick_attack(self, positions: list[int]) -> None:
        """A short run on every sample, so that nothing is proved of what was never attacked."""
        if self.settings.attack_steps:
            self._attack(positions, -(-self.settings.attack_steps // 4), 1)

    def _full_attack(self, positions: list[int]) -> None:
        if self.settings.attack_steps:
            self._attack(positions, self.settings.attack_steps, self.settings.restarts)

    def _attack(self, positions: list[int], steps: int, restarts: int) -> None:
        part = self.batch.select(positions)
        points, _ = attack(self.model, part, steps=steps, restarts=restarts, seed=self.settings.seed)
        self.attacked.update(zip(positions, points, strict=True))
        self._replay(positions, points, "attack")

    def _interval(self, positions: list[int]) -> None:
        part = self.batch.select(positions)
        with torch.no_grad():
            box = interval.ball(part.images.double(), part.epsilon, part.domain)
            lower = self.engine.interval_margins(box, part.labels)
        self._accept("ibp", positions, part, lower)

    def _linear(self, positions: list[int]) -> None:
        part = self.batch.select(positions)
        limit = self.settings.seconds_per_sample
        left = sum(limit - self.seconds[p] for p in positions)
        effort = linear.Effort(
            rows=self.settings.intermediate_rows, deadline=time.perf_counter() + left if limit > 0 else None
        )
        with torch.no_grad():
            box = interval.ball(part.images.double(), part.epsilon, part.domain)
            known = torch.stack([self.bounds[p] for p in positions])
            lower = self.engine.linear_margins(box, part.labels, known=known, effort=effort)
        self._accept("crown", positions, part, lower)

    def _alpha(self, positions: list[int]) -> None:
        part = self.batch.select(positions)
        limit = self.settings.seconds_per_sample
        left = sum(limit - self.seconds[p] for p in positions)
        # half of what is left: branch and bound makes more of the other half
        effort = linear.Effort(
            rows=self.settings.intermediate_rows, deadline=time.perf_counter() + left / 2 if limit > 0 else None
        )
        box = interval.ball(part.images.double(), part.epsilon, part.domain)
        known = torch.stack([self.bounds[p] for p in positions])
        if self.settings.engine != "cactus":
            steps = self.settings.alpha_iterations
            lower = self.engine.alpha_margins(box, part.labels, known=known, effort=effort, iterations=steps)
            self._accept("alpha", positions, part, lower)
            return
        found = alpha.alpha_margins(
            self.model.graph,
            self.model.double,
            box,
            part.labels,
            known=known,
            effort=effort,
            how=alpha.Search(self.settings.alpha_iterations, deadline=effort.deadline),
            rounding=self.rounding,
        )
        self._accept("alpha", positions, part, found.lower)
        if self.settings.bound == "branch":
            self.optimised.append((positions, found))

    def _branch(self, positions: list[int]) -> None:
        limit = self.settings.seconds_per_sample
        budget = Budget(self.settings.max_nodes, limit or DEFAULT_SECONDS, -(-self.settings.alpha_iterations // 2))
        for known, margins in self.optimised:
            mine = [p for p in known if p in positions]
            if not mine:
                continue
            chosen = torch.tensor([known.index(p) for p in mine], device=self.model.device)
            part = self.batch.select(mine)
            spent = [self.seconds[p] if limit > 0 else 0.0 for p in mine]
            outcomes = branch(self.model, part, margins.select(chosen), budget, spent)
            self.costs.update((p, o.seconds - s) for p, o, s in zip(mine, outcomes, spent, strict=True))
            for position, outcome in zip(mine, outcomes, strict=True):
                if outcome.point is not None:
                    self._replay([position], outcome.point[None], "branch")
            self._accept("branch", mine, part, torch.stack([o.lower for o in outcomes]))
            for position, outcome in zip(mine, outcomes, strict=True):
                self.decide(position, Verdict.UNKNOWN, outcome.reason or "bounds")

    # --- what stages share ------------------------------------------------------------------------------------------

    def _replay(self, positions: list[int], points: Tensor, by: str) -> None:
        hits = replays(self.model, self.batch.select(positions), points)
        for i in hits.nonzero()[:, 0].tolist():
            self.decide(positions[i], Verdict.FALSIFIED, by, points[i])
            self.attacked[positions[i]] = points[i]
            self.fallen.add(positions[i])

    def _accept(self, engine: str, positions: list[int], part: Batch, lower: Tensor) -> None:
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

    def _verdict(self, position: int) -> SampleVerdict:
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
