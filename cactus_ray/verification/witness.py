"""Looking for counterexamples of a specification: projected gradient descent on how far outputs are from unsafe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import forward
from cactus_ray.verification.soundness import Model
from cactus_ray.verification.unsafe import Unsafe

Replay = Callable[[Tensor], Tensor]
"""Outputs [N, K] of float32 inputs [N, *input], as the runtime computes them from the file."""
TARGETS = 10
"""Disjuncts, the nearest ones, that get runs of their own."""


@dataclass(frozen=True, slots=True)
class Witness:
    """Float32 input [*input] and output [K], as the runtime computes it."""

    inputs: Tensor
    outputs: Tensor


class ContradictionError(Exception):
    """A claimed lower bound is above the value at a point of the box: a bound is wrong, and no answer to be trusted."""


def confirmed(model: Model, unsafe: Unsafe, points: Tensor, replay: Replay) -> Witness | None:
    """The first of the float32 points [N, *input] that is a counterexample.

    Its outputs are unsafe, compared exactly, both in float64 and as the runtime computes them.
    """
    if len(points) == 0:
        return None
    points = torch.minimum(torch.maximum(points.float(), unsafe.first), unsafe.last)
    with torch.no_grad():
        outputs = forward(model.graph, model.double, points.double())
    likely = (unsafe.worst(unsafe.excess(outputs)) <= 1e-9).any(1).nonzero()[:, 0].tolist()
    for i in likely:
        if unsafe.holds(outputs[i]) and unsafe.holds((answer := replay(points[i : i + 1])[0]).double()):
            return Witness(points[i], answer)
    return None


def search(
    model: Model, unsafe: Unsafe, replay: Replay, *, steps: int, restarts: int, generator: torch.Generator
) -> Witness | None:
    """A counterexample found from the middle of the box and random points, or None. Deterministic by ``generator``.

    Every start is tried once with the nearest disjunct of the moment, and once with each of the TARGETS disjuncts that
    are nearest in the middle.
    """
    middle = ((unsafe.first.double() + unsafe.last.double()) / 2).float()[None]
    with torch.no_grad():
        near = unsafe.worst(unsafe.excess(forward(model.graph, model.single, middle)))[0].argsort()[:TARGETS].tolist()
    targets = [-1, *near] if len(unsafe.members) > 1 else [-1]
    for _ in range(restarts):
        share = torch.rand(middle.shape[1:], generator=generator).to(middle)
        start = torch.lerp(unsafe.first, unsafe.last, share)[None]
        target = torch.tensor(targets)
        starts = torch.cat([middle, start]).repeat_interleave(len(targets), 0)
        points = descend(model, unsafe, starts, target.repeat(2), steps)
        if (found := confirmed(model, unsafe, points, replay)) is not None:
            return found
    return None


def descend(model: Model, unsafe: Unsafe, start: Tensor, target: Tensor, steps: int) -> Tensor:
    """The points with the smallest excess on ``steps`` signed gradient steps from float32 points [N, *input].

    ``target`` [N]: the disjunct that is aimed at; -1: the nearest one of the moment. Steps shrink linearly from a
    quarter of each input's range.
    """
    size = (unsafe.last - unsafe.first) / 4
    x = torch.minimum(torch.maximum(start, unsafe.first), unsafe.last)
    best, best_excess = x.clone(), torch.full(x.shape[:1], torch.inf, dtype=x.dtype)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            worst = unsafe.worst(unsafe.excess(forward(model.graph, model.single, x)))
            nearest = worst.amin(1)
            aimed = worst.gather(1, target.clamp(min=0)[:, None])[:, 0]
            loss = torch.where(target < 0, nearest, aimed)
        better = nearest.detach() < best_excess
        best[better], best_excess[better] = x.detach()[better], nearest.detach()[better]
        if step == steps or bool((best_excess < 0).all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        moved = x.detach() - size * (1 - step / steps) * gradient.sign()
        x = torch.minimum(torch.maximum(moved, unsafe.first), unsafe.last)
    return best
