"""Deciding a specification: attacks, interval and linear bounds of the unsafe forms, and splitting of what they leave.

A case is safe where on every part of its box each disjunct has a form that stays above its number. Boxes with few free
inputs (such as ACAS Xu's five) are split, the worst part first, at the input that moves the bound most; boxes with many
(images) are split at ReLUs, see ``disjuncts``.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

import torch
from torch import Tensor

from cactus_ray.bounds import linear
from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rounding import Rounding, gamma
from cactus_ray.bounds.rows import Rows
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.verification import disjuncts
from cactus_ray.verification.soundness import Model, is_out_of_memory
from cactus_ray.verification.unsafe import Unsafe
from cactus_ray.verification.vnnlib import Specification
from cactus_ray.verification.witness import ContradictionError, Replay, Witness, confirmed, descend, search

FEW = 64
"""Free inputs up to which a box is split at its inputs."""
PARTS = 128
"""Parts of a box that are split at once."""
ATTACK_STEPS, RESTARTS = 50, 4
SEARCH_EVERY, SEARCHED = 8, 16
"""Every how many rounds of splitting gradients look for a counterexample, and from how many parts."""


class Result(StrEnum):
    """What VNN-COMP calls the answers. sat: a counterexample is known; unsat: there is none."""

    SAT = "sat"
    UNSAT = "unsat"
    UNKNOWN = "unknown"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer; for sat with its witness.

    ``reason``: what stood in the way of unknown. ``parts``: boxes and sub-problems that were bounded.
    """

    result: Result
    witness: Witness | None
    reason: str
    seconds: float
    parts: int


def decide(
    graph: Graph,
    params: Params,
    specification: Specification,
    order: Tensor,
    replay: Replay,
    *,
    timeout: float,
    arithmetic: str = "float32",
) -> Answer:
    """Whether an input of the specification's boxes has an unsafe output. Deterministic but for the time.

    ``params``: float64; ``order``: see ``OnnxNetwork``; ``replay``: the deployed file. unsat is proved with every
    rounding of the bounds charged, and unless ``arithmetic`` is "real" that of the deployed network, too; sat means
    that the witness replays. A time-out (``timeout`` seconds), NaN and lack of memory never give sat or unsat. Raises
    UserError where specification and network do not fit, ContradictionError where a bound is contradicted.
    """
    started = time.perf_counter()
    shapes = graph.shapes(params)
    inputs, outputs = order.numel(), shapes[graph.output.name][0]
    if (specification.inputs, specification.outputs) != (inputs, outputs):
        raise UserError(
            f"the specification has {specification.inputs} inputs and {specification.outputs} outputs; the network has"
            f" {inputs} and {outputs}"
        )
    if not params:
        raise UnsupportedGraphError("the network has no layer with weights")
    model = Model.of(graph, params)
    if not all(bool(torch.isfinite(p).all()) for p in params.values()):
        return Answer(Result.UNKNOWN, None, "non_finite", time.perf_counter() - started, 0)
    with exact_arithmetic(model.device):
        rounding = Rounding.of(graph, model.double, arithmetic)
        work = _Work(model, rounding, arithmetic, replay, started + timeout)
        cases = [Unsafe.of(case, outputs, order, graph.input_shape) for case in specification.cases]
        result, witness, reason = work.run(cases)
    return Answer(result, witness, reason, time.perf_counter() - started, work.parts)


@dataclass(slots=True)
class _Work:
    """The cases of one specification on their way. ``deadline``: of ``time.perf_counter``.

    ``latest``: boxes of all nodes and bounds of the forms [N, R] of the parts that were bounded last.
    """

    model: Model
    rounding: Rounding
    arithmetic: str
    replay: Replay
    deadline: float
    parts: int = 0
    rounds: int = 0
    size: int = 2 * PARTS
    latest: tuple[Mapping[str, Box], Tensor] | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def run(self, cases: list[Unsafe]) -> tuple[Result, Witness | None, str]:
        """Attacks on all cases come before bounds of any."""
        for unsafe in cases:
            found = search(
                self.model, unsafe, self.replay, steps=ATTACK_STEPS, restarts=RESTARTS, generator=self.generator
            )
            if found is not None:
                return Result.SAT, found, ""
            if self.late:
                return Result.TIMEOUT, None, "time"
        reasons = []
        for unsafe in cases:
            try:
                found, reason = self.prove(unsafe)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found, reason = None, "out_of_memory"
            if found is not None:
                return Result.SAT, found, ""
            if reason:
                reasons.append(reason)
        if not reasons:
            return Result.UNSAT, None, ""
        return (Result.TIMEOUT if "time" in reasons else Result.UNKNOWN), None, reasons[0]

    def prove(self, unsafe: Unsafe) -> tuple[Witness | None, str]:
        """Splits the case's box until all parts are safe: a counterexample, or what stood in the way (empty: none)."""
        if unsafe.free > FEW:
            return self.prove_whole(unsafe)
        numbers = count()
        waiting: list[tuple[float, int, _Part]] = []
        parts = [_Part(unsafe.lower, unsafe.upper, torch.zeros_like(unsafe.lower))]
        reason = ""
        while parts or waiting:
            while parts:
                if self.late:
                    return None, "time"
                found, open_ = self.bound(unsafe, parts[: self.size])
                if open_ is None:  # too many at once
                    continue
                parts = parts[self.size :]
                if found is not None:
                    return found, ""
                for bound, part in open_:
                    heapq.heappush(waiting, (bound, next(numbers), part))
            for _ in range(min(PARTS, len(waiting))):
                halves = heapq.heappop(waiting)[2].halves()
                if not halves:
                    reason = "bounds"  # a part of neighbouring numbers stays open
                parts += halves
        return None, reason

    def prove_whole(self, unsafe: Unsafe) -> tuple[Witness | None, str]:
        """As ``prove``, of a box that is too wide to be split: its bounds, then branching over ReLUs."""
        if self.late:
            return None, "time"
        part = _Part(unsafe.lower, unsafe.upper, torch.zeros_like(unsafe.lower))
        found, open_ = self.examine(unsafe, [part])
        if found is not None or not open_:
            return found, ""
        assert self.latest is not None
        proof = disjuncts.prove(
            self.model, unsafe, self.replay, self.latest, arithmetic=self.arithmetic, deadline=self.deadline
        )
        self.parts += proof.nodes
        return proof.witness, proof.reason

    def bound(self, unsafe: Unsafe, parts: list[_Part]) -> tuple[Witness | None, list[tuple[float, _Part]] | None]:
        """As ``examine``, or (None, None) where memory ran out and fewer parts at once are to be tried."""
        try:
            return self.examine(unsafe, parts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(parts) == 1:
                raise
            self.size = len(parts) // 2
        return None, None

    def examine(self, unsafe: Unsafe, parts: list[_Part]) -> tuple[Witness | None, list[tuple[float, _Part]]]:
        """A counterexample, or the parts that are still open, each with its bound (below 0) and what moves it."""
        self.parts += len(parts)
        self.rounds += 1
        lower, upper = torch.stack([p.lower for p in parts]), torch.stack([p.upper for p in parts])
        left = torch.arange(len(parts))
        floors = lower.new_empty(0)
        for intermediate in ("ibp", "crown"):
            box = Box.between(lower[left], upper[left])
            effort = linear.Effort(intermediate=intermediate, deadline=self.deadline)
            with torch.no_grad():
                relaxed, floors = self.floors(unsafe, box, effort)
                self.check(unsafe, box.center, floors)
            open_ = ~(unsafe.worst(floors - unsafe.bounds) > 0).all(1)  # NaN stays open
            left, floors = left[open_], floors[open_]
            if len(left) == 0:
                return None, []
        with torch.no_grad():
            relaxed = relaxed.select(open_.nonzero()[:, 0])
            gaps = floors - unsafe.bounds
            slopes = self.slopes(unsafe, relaxed, gaps)
        corners = torch.where(slopes > 0, lower[left], upper[left])
        self.check(unsafe, corners, floors)
        found = confirmed(self.model, unsafe, torch.cat([corners, (lower[left] + upper[left]) / 2]), self.replay)
        if found is None and self.rounds % SEARCH_EVERY == 0:
            start = corners[:SEARCHED].float()
            target = torch.full((len(start),), -1)
            found = confirmed(self.model, unsafe, descend(self.model, unsafe, start, target, ATTACK_STEPS), self.replay)
        bounds = unsafe.worst(gaps).amin(1).nan_to_num(nan=-torch.inf).tolist()
        moved = slopes.abs().nan_to_num() * (upper[left] - lower[left])
        open_parts = [_Part(lower[i], upper[i], m) for i, m in zip(left.tolist(), moved, strict=True)]
        return found, list(zip(bounds, open_parts, strict=True))

    def floors(self, unsafe: Unsafe, box: Box, effort: linear.Effort) -> tuple[linear.Relaxed, Tensor]:
        """The relaxed network on boxes [N], and lower bounds [N, R] of the forms there."""
        graph, params, rows = self.model.graph, self.model.double, unsafe.rows
        boxes = linear.intermediate_boxes(graph, params, box, effort, self.rounding)
        relaxed = linear.Relaxed.on(graph, params, boxes, graph.output.name, self.rounding)
        out = self.rounding.step(graph.output, params, [boxes[name] for name in graph.output.inputs])
        error = gamma(4 * rows.shape[1] + 16, self.rounding.unit)  # of these sums themselves
        floors = out.center @ rows.T - (out.radius + error * (out.center.abs() + out.radius)) @ rows.abs().T

        def forms(chunk: Tensor, start: int, stop: int) -> Rows:
            return Rows(rows[start:stop].expand(len(chunk), -1, -1))

        counts = torch.full((len(box.center),), len(rows))
        for chunk, start, stop, bound in relaxed.sweep(counts, forms, effort.memory):
            best = floors[chunk, start:stop]
            # a comparison with NaN is false: a NaN of either bound survives
            floors[chunk, start:stop] = torch.where((best >= bound) | torch.isnan(best), best, bound)
        self.latest = boxes, floors
        return relaxed, floors

    def slopes(self, unsafe: Unsafe, relaxed: linear.Relaxed, gaps: Tensor) -> Tensor:
        """Gradient [N, *input] of the bound that decides each part: the best form of its worst disjunct."""
        members = unsafe.members[unsafe.worst(gaps).argmin(1)]
        form = members.gather(1, gaps.gather(1, members).argmax(1, keepdim=True))
        rows, _ = relaxed.input_rows(Rows(unsafe.rows[form]))
        return rows.dense(tuple(relaxed.box.center.shape[1:])).coefficients[:, 0]

    def check(self, unsafe: Unsafe, points: Tensor, floors: Tensor) -> None:
        """Raises ContradictionError where a form at points [N, *input] of the boxes is below its lower bound."""
        with torch.no_grad():
            outputs = forward(self.model.graph, self.model.double, points)
        values = outputs @ unsafe.rows.T
        slack = 1e-9 * (1 + outputs.abs() @ unsafe.rows.T.abs())
        wrong = torch.isfinite(floors) & ~(values >= floors - slack)
        if bool(wrong.any()):
            part, form = (int(i) for i in wrong.nonzero()[0])
            raise ContradictionError(
                f"unsound bound: form {unsafe.rows[form].tolist()} of the outputs is claimed to be at least"
                f" {float(floors[part, form])!r}, but it is {float(values[part, form])!r} at {points[part].tolist()}"
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a case's box [*input]; ``moved``: how far each input moves the bound that is to be mended."""

    lower: Tensor
    upper: Tensor
    moved: Tensor

    def halves(self) -> list[_Part]:
        """Two halves, parted at the input that moves the bound most; none where no number lies between its ends."""
        middle = self.lower + (self.upper - self.lower) / 2
        wide = (middle > self.lower) & (middle < self.upper)
        if not bool(wide.any()):
            return []
        score = torch.where(wide, self.moved, torch.full_like(self.moved, -1.0))
        if float(score.max()) <= 0:  # nothing moves it: the widest
            score = torch.where(wide, self.upper - self.lower, torch.full_like(self.moved, -1.0))
        here = torch.zeros(score.numel(), dtype=torch.bool)
        here[int(score.argmax())] = True
        here = here.view(score.shape)
        return [
            _Part(self.lower, torch.where(here, middle, self.upper), self.moved),
            _Part(torch.where(here, middle, self.lower), self.upper, self.moved),
        ]
