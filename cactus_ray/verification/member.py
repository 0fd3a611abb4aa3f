"""Members of a family that misclassify: how they are described, found and built again.

A member's weights follow from its description, the centre and the counterexample alone, so that a few words replace a
file of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.family import Family, ends, nearest, neighbours, outside, radii
from cactus_ray.config import setting
from cactus_ray.verification.soundness import Batch, Model, margins_at, replays

KINDS = ("centre", "nearest", "grid", "corner")
MOST_WEIGHTS = 1 << 24
"""Weights of members that are attacked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Which member a counterexample is one of; with the counterexample it says the weights (``weights_of``).

    centre; nearest: every weight rounded to nearest. corner: every weight at the end of its interval (grid: at the
    code below or above it) that lowers the margin over class ``other`` at the counterexample, by the sign of its
    gradient: at the centre's weights, and then ``rounds - 1`` times at those that were found.
    """

    kind: str = setting(doc="how the weights are found", choices=KINDS)
    other: int | None = setting(None, doc="class whose margin is lowered", minimum=0)
    rounds: int = setting(1, doc="gradients taken one after the other", minimum=1, maximum=8)


@dataclass(frozen=True, slots=True)
class Subject:
    """A family around the float32 tensors of a centre, and the radii of its weights.

    ``ends``: smallest and largest weights; ``codes``: weights rounded down and up.
    """

    graph: Graph
    params: Params
    family: Family
    radii: Params
    ends: tuple[Params, Params]
    codes: tuple[Params, Params]

    @staticmethod
    def of(graph: Graph, params: Params, family: Family) -> Subject:
        """The family around the given tensors."""
        params = {k: v.detach().float() for k, v in params.items()}
        wide = radii(graph, params, family)
        return Subject(graph, params, family, wide, ends(params, wide), neighbours(graph, params, family))

    def weights_of(self, member: Member, point: Tensor, label: int) -> Params:
        """Float32 tensors of a member whose counterexample is ``point`` [*input]. ValueError for an impossible one."""
        if member.kind == "centre":
            return self.params
        if member.kind == "nearest":
            return nearest(self.graph, self.params, self.family)
        classes = self.graph.shapes(self.params)[self.graph.output.name][0]
        steered = member.other is not None and member.other != label and member.other < classes
        if member.other is None or not steered or (member.kind == "grid" and self.family.radius != "one"):
            raise ValueError(f"no member of {self.family} over label {label}: {member}")
        weights = self.params
        for _ in range(member.rounds):
            weights = {**self.params, **self.moved(member.kind, self._slopes(weights, point, label, member.other))}
        return weights

    def moved(self, kind: str, slope: Params) -> Params:
        """The weights of the member of a kind that lie against the slopes, by name [..., *shape]; float32."""
        low, high = self.ends if kind == "corner" else self.codes
        still = self.params if kind == "corner" else low  # weights on which the margin does not depend
        return {k: torch.where(s < 0, high[k], torch.where(s > 0, low[k], still[k])) for k, s in slope.items()}

    def falls(self, member: Member, batch: Batch, point: Tensor) -> bool:
        """Whether ``point`` [*input] is a counterexample of a member for the one sample of the batch; see replays."""
        weights = self.weights_of(member, point, int(batch.labels))
        if outside(self.params, weights, self.radii):
            return False
        return bool(replays(Model.of(self.graph, weights), batch, point[None])[0])

    def _slopes(self, weights: Params, point: Tensor, label: int, other: int) -> Params:
        """Gradients of the margin over ``other`` in the weights that have radii, in float64."""
        wide = {k: v.double().requires_grad_(k in self.radii) for k, v in weights.items()}
        with torch.enable_grad():
            logits = forward(self.graph, wide, point[None].double())[0]
            found = torch.autograd.grad(logits[label] - logits[other], [wide[k] for k in self.radii], allow_unused=True)
        return {k: torch.zeros_like(wide[k]) if g is None else g for k, g in zip(self.radii, found, strict=True)}


def steer(
    subject: Subject, batch: Batch, start: Tensor, steps: int, targets: int
) -> list[tuple[Member, Tensor] | None]:  # fmt: skip
    """Members and counterexamples [*input] of them, by descent in weights and input together; None: none was found.

    ``start`` [N, *input]; ``targets`` classes are tried, those first whose margins are smallest there.
    """
    with torch.no_grad():
        margins = margins_at(forward(subject.graph, subject.params, start), batch.labels)
    ranking = margins.argsort(dim=1, stable=True)
    hits: list[tuple[Member, Tensor] | None] = [None] * len(batch)
    for rank in range(min(targets, ranking.shape[1] - 1)):
        for kind in ("grid", "corner") if subject.family.radius == "one" else ("corner",):
            left = torch.tensor([i for i, h in enumerate(hits) if h is None], dtype=torch.int64)
            for part in torch.split(left, together(subject)) if len(left) else ():
                some, others = batch.select(part.tolist()), ranking[part, rank]
                steering = Steering.of(subject, kind, some.labels, others)
                points = steering.descend(some, start[part], steps)
                for rounds in (1, 3):
                    likely = steering.margins(steering.weights(points, rounds), points) < 0
                    for i in likely.nonzero()[:, 0].tolist():
                        member = Member(kind=kind, other=int(others[i]), rounds=rounds)
                        if hits[int(part[i])] is None and subject.falls(member, some.select([i]), points[i]):
                            hits[int(part[i])] = member, points[i]
    return hits


def together(subject: Subject) -> int:
    """Samples whose members fit in memory at once."""
    return max(1, MOST_WEIGHTS // sum(r.numel() for r in subject.radii.values()))


@dataclass(frozen=True, slots=True)
class Steering:
    """Members of one kind for N samples at once, each with weights of its own [N, *shape]; float32, for searching.

    ``rows`` [N, classes]: the margins ``logit[label] - logit[other]`` that are lowered.
    """

    subject: Subject
    kind: str
    rows: Tensor

    @staticmethod
    def of(subject: Subject, kind: str, labels: Tensor, others: Tensor) -> Steering:
        """For margins of labels [N] over others [N]."""
        classes = subject.graph.shapes(subject.params)[subject.graph.output.name][0]
        eye = torch.eye(classes, device=labels.device)
        return Steering(subject, kind, eye[labels] - eye[others])

    def weights(self, points: Tensor, rounds: int = 1) -> Params:
        """The weights that ``Subject.weights_of`` gives at the points [N, *input], up to the rounding of gradients."""
        subject = self.subject
        found = {k: subject.params[k].expand(len(points), *subject.params[k].shape) for k in subject.radii}
        for _ in range(rounds):
            slope = vmap(grad(self._margin))(found, points, self.rows)
            found = subject.moved(self.kind, slope)
        return found

    def margins(self, weights: Params, points: Tensor) -> Tensor:
        """Margins [N] of the samples' own members at points."""
        with torch.no_grad():
            return vmap(self._margin)(weights, points, self.rows)

    def descend(self, batch: Batch, start: Tensor, steps: int) -> Tensor:
        """The points [N, *input] of the balls with the smallest margins on ``steps`` signed steps.

        Every step is of the member that is worst at its point; sizes shrink linearly from half of epsilon.
        """
        x = torch.minimum(torch.maximum(start, batch.lower), batch.upper)
        best, smallest = x, torch.full((len(x),), torch.inf, device=x.device)
        for step in range(steps):
            weights = self.weights(x)
            slope, margins = vmap(grad_and_value(self._margin, argnums=1))(weights, x, self.rows)
            better = margins < smallest
            smallest = torch.where(better, margins, smallest)
            best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, best)
            size = 0.5 * batch.epsilon * (1 - step / steps)
            x = torch.minimum(torch.maximum(x - size * slope.sign(), batch.lower), batch.upper)
        return best

    def _margin(self, weights: Params, point: Tensor, row: Tensor) -> Tensor:
        logits = forward(self.subject.graph, {**self.subject.params, **weights}, point[None])[0]
        return (row * logits).sum()
