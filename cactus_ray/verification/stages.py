"""The stages of the cascade: each takes the batch and some of its positions, and decides them or leaves them open."""

from __future__ import annotations

import torch
from torch import Tensor

from cactus_ray.bounds import alpha, interval, linear
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.interval import Box
from cactus_ray.verification.attack import attack, targeted_attack
from cactus_ray.verification.branch import DEFAULT_SECONDS, Budget, branch
from cactus_ray.verification.soundness import Batch, margins_at
from cactus_ray.verification.verdict import Verdict
from cactus_ray.verification.work import Work


def clean(work: Work, positions: list[int]) -> None:
    """The unperturbed predictions: what is misclassified falsifies itself."""
    part = work.batch.select(positions)
    with torch.no_grad():
        logits = forward(work.model.graph, work.model.single, part.images)
    finite = torch.isfinite(logits).all(1) & work.model.finite
    right = logits.argmax(1) == part.labels
    for i, position in enumerate(positions):
        if bool(right[i]) and bool(torch.isfinite(logits[i]).all()):
            work.right.add(position)
        if not bool(finite[i]):
            work.decide(position, Verdict.UNKNOWN, "non_finite")
        elif not bool(right[i]):
            work.decide(position, Verdict.FALSIFIED, "clean", part.images[i])


def known_points(work: Work, positions: list[int]) -> None:
    """Points that the caller has heard of."""
    for position in positions:
        for image in work.known.get(work.batch.indices[position], ()):
            work.replay([position], image.to(work.batch.images).view_as(work.batch.images[:1]), "known")


def nearest_points(work: Work, positions: list[int]) -> None:
    """What came nearest to a counterexample at another level stands for the first attack."""
    hints = {p: near for p in positions if (near := work.hinted(p).nearest) is not None}
    part, like = work.batch.select(list(hints)), work.batch.images
    points = part.clip(torch.stack([near.to(like).view_as(like[0]) for near in hints.values()]).nan_to_num(0.0))
    with torch.no_grad():
        margins = margins_at(forward(work.model.graph, work.model.single, points), part.labels).amin(1)
    work.attacked_at(list(hints), points, margins, "known")


def quick_attack(work: Work, positions: list[int]) -> None:
    """A short run on every sample, so that nothing is proved of what was never attacked."""
    if work.settings.attack_steps:
        _attack(work, positions, -(-work.settings.attack_steps // 4), 1)


def full_attack(work: Work, positions: list[int]) -> None:
    """Projected gradient descent with restarts."""
    if work.settings.attack_steps:
        _attack(work, positions, work.settings.attack_steps, work.settings.restarts)


def hunt(work: Work, positions: list[int]) -> None:
    """Auto-PGD against the classes that no bound excludes yet."""
    settings = work.settings
    if not settings.attack_steps or not settings.targeted_runs:
        return
    part = work.batch.select(positions)
    start = torch.stack([work.attacked.get(p, work.batch.images[p]) for p in positions])
    found = targeted_attack(
        work.model,
        part,
        start,
        ~(_known(work, positions) > 0),
        steps=-(-settings.attack_steps // 4),
        runs=settings.targeted_runs,
        seed=settings.seed,
    )
    work.attacked_at(positions, *found, "attack")


def _attack(work: Work, positions: list[int], steps: int, restarts: int) -> None:
    part = work.batch.select(positions)
    found = attack(work.model, part, steps=steps, restarts=restarts, seed=work.settings.seed)
    work.attacked_at(positions, *found, "attack")


def interval_bounds(work: Work, positions: list[int]) -> None:
    """Interval bounds."""
    part, box = _balls(work, positions)
    with torch.no_grad():
        lower = work.engine.interval_margins(box, part.labels)
    work.accept("ibp", positions, part, lower)


def linear_bounds(work: Work, positions: list[int]) -> None:
    """CROWN, on the classes that are still open."""
    part, box = _balls(work, positions)
    effort = linear.Effort(rows=work.settings.intermediate_rows, deadline=work.deadline(positions))
    with torch.no_grad():
        lower = work.engine.linear_margins(box, part.labels, known=_known(work, positions), effort=effort)
    work.accept("crown", positions, part, lower)


def alpha_bounds(work: Work, positions: list[int]) -> None:
    """alpha-CROWN, on the classes that are still open."""
    part, box = _balls(work, positions)
    branching = work.settings.bound == "branch"
    # half of what is left: branch and bound makes more of the other half
    effort = linear.Effort(rows=work.settings.intermediate_rows, deadline=work.deadline(positions, 0.5))
    known, steps = _known(work, positions), work.settings.alpha_iterations
    if work.settings.engine != "cactus":
        lower = work.engine.alpha_margins(box, part.labels, known=known, effort=effort, iterations=steps)
        work.accept("alpha", positions, part, lower)
        return
    found = alpha.alpha_margins(
        work.model.graph,
        work.model.double,
        box,
        part.labels,
        known=known,
        effort=effort,
        how=alpha.Search(steps, deadline=effort.deadline),
        rounding=work.rounding,
    )
    work.accept("alpha", positions, part, found.lower)
    if branching:
        work.optimised.append((positions, found))


def branch_and_bound(work: Work, positions: list[int]) -> None:
    """Branch and bound from where alpha-CROWN ended; decides all, if only that they stay UNKNOWN, and why."""
    limit = work.settings.seconds_per_sample
    budget = Budget(work.settings.max_nodes, limit or DEFAULT_SECONDS, -(-work.settings.alpha_iterations // 2))
    for known, margins in work.optimised:
        mine = [p for p in known if p in positions]
        if not mine:
            continue
        chosen = torch.tensor([known.index(p) for p in mine], device=work.model.device)
        part = work.batch.select(mine)
        spent = [work.seconds[p] if limit > 0 else 0.0 for p in mine]
        outcomes = branch(work.model, part, margins.select(chosen), budget, spent)
        work.costs.update((p, o.seconds - s) for p, o, s in zip(mine, outcomes, spent, strict=True))
        for position, outcome in zip(mine, outcomes, strict=True):
            if outcome.point is not None:
                work.replay([position], outcome.point[None], "branch")
        work.accept("branch", mine, part, torch.stack([o.lower for o in outcomes]))
        for position, outcome in zip(mine, outcomes, strict=True):
            work.decide(position, Verdict.UNKNOWN, outcome.reason or "bounds")


def _balls(work: Work, positions: list[int]) -> tuple[Batch, Box]:
    part = work.batch.select(positions)
    return part, interval.ball(part.images.double(), part.epsilon, part.domain)


def _known(work: Work, positions: list[int]) -> Tensor:
    return torch.stack([work.bounds[p] for p in positions])
