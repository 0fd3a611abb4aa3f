"""Attacks by gradients: PGD on margins (Madry et al. 2018; Carlini and Wagner 2017), Auto-PGD (Croce and Hein 2020).

Random numbers depend on (seed, index of the sample) only, and what is found for a sample on its neighbours in the batch
by the rounding of batched sums only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import forward
from cactus_ray.verification.soundness import Batch, Model, margins_at, random_like

CLEAR = 1e-4
"""How far below 0 a margin of float32 must be before the search stops: a smaller one may not replay in float64."""

AT_ONCE = 256
"""Images that several runs of a targeted attack on few samples fill a batch to."""


def sample_generators(seed: int, indices: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One CPU generator per sample, a function of (seed, index, purpose) only."""
    found = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return found


def fell(margins: Tensor) -> Tensor:
    """Whether margins [N] are clearly negative."""
    return margins < -CLEAR


def attack(model: Model, batch: Batch, *, steps: int, restarts: int, seed: int) -> tuple[Tensor, Tensor]:
    """The points [N, C, H, W] (float32, admissible) with the smallest margins found, and these margins [N].

    The first run starts at the image and always pushes the strongest class; further runs start at random points and
    take the classes in the order of their logits, one each. A sample that ``fell`` leaves.
    """
    points, margins = descend(model, batch, batch.images, None, steps)
    generators = sample_generators(seed, batch.indices, "attack")
    with torch.no_grad():
        ranking = margins_at(forward(model.graph, model.single, points), batch.labels).argsort(dim=1, stable=True)
    for run in range(1, restarts):
        share = random_like(batch.images, generators)  # drawn for all, so that no sample's depend on another's
        left = (~fell(margins)).nonzero()[:, 0]
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
    x = batch.clip(start)
    best, best_margin = x.clone(), torch.full(x.shape[:1], torch.inf, device=x.device)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            margins = margins_at(forward(model.graph, model.single, x), batch.labels)
            smallest = margins.amin(1)
            loss = smallest if target is None else margins.gather(1, target[:, None])[:, 0]
        better = (smallest.detach() < best_margin) & ~fell(best_margin)
        best[better], best_margin[better] = x.detach()[better], smallest.detach()[better]
        if step == steps or bool(fell(best_margin).all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        size = 0.5 * batch.epsilon * (1 - step / steps)
        x = batch.clip(x.detach() - size * gradient.sign())
    return best, best_margin


def targeted_attack(
    model: Model, batch: Batch, points: Tensor, undecided: Tensor, *, steps: int, runs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Auto-PGD from random starts against classes that may be reached: points and margins as of ``attack``.

    ``points``: the best known; none that is worse is returned. ``undecided`` [N, classes]: what no bound excludes. Each
    run takes the next of these classes, in the order of their margins at ``points``, and the two losses of ``auto_pgd``
    in turn; the first point that fell is kept. Many short runs find more than few long ones: what counts is which class
    is pushed, and from where.
    """
    points = points.clone()
    with torch.no_grad():
        found = margins_at(forward(model.graph, model.single, points), batch.labels)
    margins = found.amin(1)
    reachable = found.masked_fill(~undecided, torch.inf)
    ranking, count = reachable.argsort(dim=1, stable=True), torch.isfinite(reachable).sum(1)
    generators = sample_generators(seed, batch.indices, "targeted attack")
    together = max(1, AT_ONCE // max(1, len(batch)))
    for first in range(0, runs, together):
        group = range(first, min(first + together, runs))
        shares = [random_like(batch.images, generators) for _ in group]  # for all, as in ``attack``
        left = (~fell(margins) & (count > 0)).nonzero()[:, 0]
        if len(left) == 0:
            break
        part = batch.select(left.tolist() * len(group))
        start = torch.lerp(part.lower, part.upper, torch.cat([share[left] for share in shares]))
        target = torch.cat([ranking[left, run % count[left]] for run in group])
        scaled = torch.tensor([run % 2 == 1 for run in group], device=target.device).repeat_interleave(len(left))
        ends, end_margins = auto_pgd(model, part, start, target, steps, scaled)
        for end, margin in zip(torch.split(ends, len(left)), torch.split(end_margins, len(left)), strict=True):
            better = (margin < margins[left]) & ~fell(margins[left])
            points[left[better]], margins[left[better]] = end[better], margin[better]
    return points, margins


def auto_pgd(
    model: Model, batch: Batch, start: Tensor, target: Tensor, steps: int, scaled: Tensor
) -> tuple[Tensor, Tensor]:
    """One run of Auto-PGD (Croce and Hein 2020, Algorithm 1) on the margins to the classes ``target`` [N].

    Signed gradient steps with momentum, of 2 epsilon at first; at checkpoints the step of a sample whose loss did not
    fall in three quarters of the steps since the last, or that gained nothing with the same step, is halved, and the
    sample goes back to its best point. ``scaled`` [N]: whose loss is the targeted difference of logits ratio (Eq. 6).
    Returns points and smallest margins over all classes, as ``descend``.
    """
    walk = _Walk.at(batch.clip(start), 2 * batch.epsilon)
    best, best_margin = walk.x.clone(), torch.full(start.shape[:1], torch.inf, device=start.device)
    marks = set(checkpoints(steps))
    for step in range(steps + 1):
        x = walk.x.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            logits = forward(model.graph, model.single, x)
            margins = margins_at(logits, batch.labels)
            loss = margins.gather(1, target[:, None])[:, 0]
            if logits.shape[1] > 3:  # with fewer classes the ratio is constant
                top = logits.topk(4, dim=1).values
                loss = torch.where(scaled, loss / (top[:, 0] - top[:, 2:].mean(1)).clamp(min=1e-12), loss)
        smallest = margins.detach().amin(1)
        better = (smallest < best_margin) & ~fell(best_margin)
        best[better], best_margin[better] = x.detach()[better], smallest[better]
        if step == steps or bool(fell(best_margin).all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        walk.see(loss.detach(), gradient)
        if step in marks:
            walk.look_back()
        walk.move(batch, momentum=0.75 if step else 1.0)
    return best, best_margin


def checkpoints(steps: int) -> list[int]:
    """Steps at which Auto-PGD looks back: after 22 % of them, then at distances that shrink to 6 % (their Sec. 3.1)."""
    found, share, gap = [], 22, 22  # per cent
    while share < 100:
        found.append(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return found


@dataclass(slots=True)
class _Walk:
    """Where every sample [N] of a run of Auto-PGD is, and its best point so far.

    ``before``: the point before ``x``. ``falls``: how many of the ``since`` steps after the last checkpoint the loss
    fell in. ``old_size``, ``old_best``: step size and best loss at the last checkpoint.
    """

    x: Tensor
    before: Tensor
    gradient: Tensor
    size: Tensor
    loss: Tensor
    best: Tensor
    best_x: Tensor
    best_gradient: Tensor
    falls: Tensor
    old_size: Tensor
    old_best: Tensor
    since: int = 0

    @staticmethod
    def at(x: Tensor, size: float) -> _Walk:
        zero, endless = x.new_zeros(len(x)), x.new_full((len(x),), torch.inf)
        still = torch.zeros_like(x)
        return _Walk(
            x, x, still, zero + size, -endless, endless, x.clone(), still.clone(), zero, zero + size, endless
        )  # fmt: skip

    def see(self, loss: Tensor, gradient: Tensor) -> None:
        """Loss and gradient at ``x``."""
        self.falls = self.falls + (loss < self.loss)
        self.loss, self.gradient = loss, gradient
        better = loss < self.best
        self.best = torch.where(better, loss, self.best)
        self.best_x[better], self.best_gradient[better] = self.x[better], gradient[better]

    def look_back(self) -> None:
        """Halve the steps of samples that got stuck, and put them back to their best points."""
        stuck = (self.falls < 0.75 * self.since) | ((self.size == self.old_size) & (self.best == self.old_best))
        self.old_size, self.old_best = self.size, self.best
        self.size = torch.where(stuck, self.size / 2, self.size)
        self.loss = torch.where(stuck, self.best, self.loss)
        wide = _wide(stuck, self.x)
        self.before = torch.where(wide, self.best_x, self.before)
        self.x = torch.where(wide, self.best_x, self.x)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.falls, self.since = torch.zeros_like(self.falls), 0

    def move(self, batch: Batch, momentum: float) -> None:
        """A step along the signs of the gradient, with ``1 - momentum`` of the step before."""
        step = batch.clip(self.x - _wide(self.size, self.x) * self.gradient.sign())
        ahead = batch.clip(self.x + momentum * (step - self.x) + (1 - momentum) * (self.x - self.before))
        self.before, self.x = self.x, ahead
        self.since += 1


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[N] reshaped so that it broadcasts over the samples of ``like``."""
    return values.view(-1, *([1] * (like.dim() - 1)))
