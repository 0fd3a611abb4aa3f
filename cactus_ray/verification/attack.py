"""Projected gradient descent on margins (Madry et al. 2018; margin loss of Carlini and Wagner 2017)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cactus_ray.bounds.graph import forward
from cactus_ray.verification.soundness import Batch, Model, margins_at, random_like


def sample_generators(seed: int, indices: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One CPU generator per sample, a function of (seed, index, purpose) only."""
    found = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return found


def attack(model: Model, batch: Batch, *, steps: int, restarts: int, seed: int) -> tuple[Tensor, Tensor]:
    """The points [N, C, H, W] (float32, admissible) with the smallest margins found, and these margins [N].

    The first run starts at the image and always pushes the strongest class; further runs start at random points and
    take the classes in the order of their logits, one each. A sample with a negative margin leaves. Deterministic; a
    sample's random numbers depend on (seed, its index) only, and its result on the batch by rounding only.
    """
    points, margins = descend(model, batch, batch.images, None, steps)
    generators = sample_generators(seed, batch.indices, "attack")
    with torch.no_grad():
        ranking = margins_at(forward(model.graph, model.single, points), batch.labels).argsort(dim=1, stable=True)
    for run in range(1, restarts):
        share = random_like(batch.images, generators)  # drawn for all, so that no sample's depend on another's
        left = (~(margins < 0)).nonzero()[:, 0]
        if len(left) == 0:
            break
        part = batch.select(left.tolist())
        start = torch.lerp(part.lower, part.upper, share[left])
        target = ranking[left, (run - 1) % max(1, ranking.shape[1] - 1)]
        found, found_margins = descend(model, part, start, target, steps)
        better = found_margins < margins[left]
        points[left[better]], margins[left[better]] = found[better], found_margins[better]
    return points, margins


def descend(model: Model, batch: Batch, start: Tensor, target: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    """One run of ``steps`` signed gradient steps, linearly shrinking from half of epsilon, from ``start``.

    ``target`` [N]: the class whose margin is made small, None: the one with the smallest margin of the moment. The
    best point counts by its smallest margin over all classes.
    """
    x = torch.minimum(torch.maximum(start, batch.lower), batch.upper)
    best, best_margin = x.clone(), torch.full(x.shape[:1], torch.inf, device=x.device)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            margins = margins_at(forward(model.graph, model.single, x), batch.labels)
            smallest = margins.amin(1)
            loss = smallest if target is None else margins.gather(1, target[:, None])[:, 0]
        better = smallest.detach() < best_margin
        best[better], best_margin[better] = x.detach()[better], smallest.detach()[better]
        if step == steps or bool((best_margin < 0).all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        size = 0.5 * batch.epsilon * (1 - step / steps)
        x = torch.minimum(torch.maximum(x.detach() - size * gradient.sign(), batch.lower), batch.upper)
    return best, best_margin
