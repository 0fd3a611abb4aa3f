"""Verdicts on all members of a family of networks at once, and members that show why a sample has none.

CERTIFIED: every member classifies every input of the ball as the label. FALSIFIED: one member does not, and both it and
the input are given; it need not be a network that a quantiser would make, unless its kind is nearest or grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.family import Family, corner, nearest, neighbours, outside, radii
from cactus_ray.config import ThreatConfig, setting
from cactus_ray.verification.attack import attack
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.soundness import (
    Batch,
    Model,
    SoundnessError,
    exact_arithmetic,
    halving,
    margins_at,
    replays,
)
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

KINDS = ("centre", "nearest", "grid", "corner")
SEARCHED = ("alpha", "branch")
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
class FamilyVerdict:
    """One sample's verdict for the whole family; ``member`` where it is FALSIFIED."""

    sample: SampleVerdict
    member: Member | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A family around the float32 tensors of a centre, and the radii of its weights."""

    graph: Graph
    params: Params
    family: Family
    radii: Params

    @staticmethod
    def of(graph: Graph, params: Params, family: Family) -> Subject:
        """The family around the given tensors."""
        params = {k: v.detach().float() for k, v in params.items()}
        return Subject(graph, params, family, radii(graph, params, family))

    def weights_of(self, member: Member, point: Tensor, label: int) -> Params:
        """Float32 tensors of a member whose counterexample is ``point`` [*input]. ValueError for an impossible one."""
        if member.kind == "centre":
            return self.params
        if member.kind == "nearest":
            return nearest(self.graph, self.params, self.family)
        if member.other is None or member.other == label or (member.kind == "grid" and self.family.radius != "one"):
            raise ValueError(f"no member of {self.family} over label {label}: {member}")
        weights = self.params
        for _ in range(member.rounds):
            weights = self.moved(member.kind, self._slopes(weights, point, label, member.other))
        return weights

    def moved(self, kind: str, slope: Params) -> Params:
        """The member of a kind whose weights lie against the slopes, by name [..., *shape]; float32."""
        if kind == "grid":
            return neighbours(self.graph, self.params, self.family, {k: s < 0 for k, s in slope.items()})
        return corner(self.params, self.radii, {k: -s.sign() for k, s in slope.items()})

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


def verify_family(
    graph: Graph,
    params: Params,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threat: ThreatConfig,
    settings: VerificationSettings,
    family: Family,
) -> list[FamilyVerdict]:
    """Verdicts for the whole family around ``params``, the float32 tensors of the centre; the rest as of ``verify``.

    Bounds that hold for every member certify; the centre, the network rounded to nearest, and weights and input
    together are attacked, also where bounds certify. What alpha-CROWN and branch and bound are to decide is attacked
    before. ``seconds_per_sample`` limits the bounds up to CROWN, and those beyond, each by itself. Raises as
    ``verify`` does, SoundnessError also where a member contradicts a bound, UserError for an engine that does not know
    families.
    """
    work = _Work(Subject.of(graph, params, family), images, labels, list(indices), threat, settings)
    everything = list(range(len(work.indices)))
    dear = settings.bound in SEARCHED
    work.bound(everything, replace(settings, bound="crown") if dear else settings)
    with exact_arithmetic(next(iter(params.values())).device):
        for start in range(0, len(everything), settings.batch_size):
            halving(work.attack, everything[start : start + settings.batch_size])
    if dear:
        work.bound([p for p in everything if work.found[p].sample.verdict is Verdict.UNKNOWN], settings)
    return [work.found[p] for p in everything]


@dataclass(slots=True)
class _Work:
    subject: Subject
    images: Tensor
    labels: Tensor
    indices: list[int]
    threat: ThreatConfig
    settings: VerificationSettings
    found: dict[int, FamilyVerdict] = field(default_factory=dict)

    def bound(self, positions: list[int], settings: VerificationSettings) -> None:
        """The cascade with bounds of the family; what it falsifies is the centre, a member, too."""
        if not positions:
            return
        chosen = torch.tensor(positions)
        part = self.images[chosen], self.labels[chosen], [self.indices[p] for p in positions]
        subject = self.subject
        verdicts = verify(subject.graph, subject.params, *part, self.threat, settings, radii=subject.radii)
        for p, new in zip(positions, verdicts, strict=True):
            before = self.found[p].sample.seconds if p in self.found else 0.0
            fallen = Member(kind="centre") if new.verdict is Verdict.FALSIFIED else None
            self.found[p] = FamilyVerdict(replace(new, seconds=new.seconds + before), fallen)

    def attack(self, positions: list[int]) -> None:
        """Attack other members: shortly what is certified, with all steps what is open."""
        positions = [p for p in positions if self.found[p].sample.verdict is not Verdict.FALSIFIED]
        model = Model.of(self.subject.graph, self.subject.params)
        if not positions or self.settings.attack_steps == 0 or not model.finite:
            return
        begun = time.perf_counter()
        batch = self.batch(positions, model.device)
        rounded = Model.of(self.subject.graph, nearest(self.subject.graph, self.subject.params, self.subject.family))
        points, _ = attack(rounded, batch, steps=self.settings.attack_steps, restarts=1, seed=self.settings.seed)
        falls = replays(rounded, batch, points)
        shared = (time.perf_counter() - begun) / len(positions)
        hits = {p: (Member(kind="nearest"), points[i]) for i, p in enumerate(positions) if bool(falls[i])}
        sure = [i for i, p in enumerate(positions) if self.found[p].sample.verdict is Verdict.CERTIFIED]
        rest = [i for i in range(len(positions)) if i not in sure]
        for some, steps, targets in ((sure, 0, 1), (rest, -(-self.settings.attack_steps // 2), self.settings.restarts)):
            left = [i for i in some if positions[i] not in hits]
            found = steer(self.subject, batch.select(left), points[left], steps, targets) if left else []
            hits.update({positions[i]: hit for i, hit in zip(left, found, strict=True) if hit is not None})
        seconds = (time.perf_counter() - begun) / len(positions)
        for position in positions:
            self.learn(position, hits.get(position), seconds)

    def batch(self, positions: list[int], device: torch.device) -> Batch:
        """The samples at some positions, with their balls."""
        chosen = torch.tensor(positions)
        images, labels = self.images[chosen].to(device), self.labels[chosen].to(device)
        return Batch.of(images, labels, [self.indices[p] for p in positions], self.threat.epsilon, self.threat.domain)

    def learn(self, position: int, hit: tuple[Member, Tensor] | None, seconds: float) -> None:
        """Take the result of an attack on one sample; raises where it contradicts a proof."""
        old = self.found[position].sample
        if hit is None:
            self.found[position] = FamilyVerdict(replace(old, seconds=old.seconds + seconds))
            return
        member, point = hit
        if old.verdict is Verdict.CERTIFIED:
            raise self.contradiction(old, member, point)
        self.found[position] = FamilyVerdict(
            replace(
                old, verdict=Verdict.FALSIFIED, lower_bound=None, decided_by=member.kind, seconds=old.seconds + seconds,
                counterexample=tuple(point.detach().cpu().flatten().tolist()),
            ),
            member,
        )  # fmt: skip

    def contradiction(self, old: SampleVerdict, member: Member, point: Tensor) -> SoundnessError:
        """The error that says which certified bound a member's counterexample contradicts."""
        weights = {k: v.double() for k, v in self.subject.weights_of(member, point, old.label).items()}
        label = torch.tensor([old.label], device=point.device)
        with torch.no_grad():
            margins = margins_at(forward(self.subject.graph, weights, point[None].double()), label)[0]
        other = int(margins.argmin())
        bound = 0.0 if old.lower_bound is None else old.lower_bound
        name = f"{old.decided_by} ({self.subject.family}, {member.kind})"
        return SoundnessError(name, old.index, old.label, other, bound, float(margins[other]), point.detach().cpu())


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
            for part in left.split(together(subject)) if len(left) else ():
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
            whole = subject.moved(self.kind, slope)
            found = {k: whole[k] for k in subject.radii}
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
