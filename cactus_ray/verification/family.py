"""Verdicts on all members of a family of networks at once.

CERTIFIED: every member classifies every input of the ball as the label. FALSIFIED: one member does not, and both it and
the input are given; it need not be a network that a quantiser would make, unless its kind is nearest or grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.family import Family, nearest
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.attack import attack
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.member import Member, Subject, steer
from cactus_ray.verification.soundness import (
    Batch,
    Model,
    SoundnessError,
    halving,
    margins_at,
    replays,
)
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

SEARCHED = ("alpha", "branch")


@dataclass(frozen=True, slots=True)
class FamilyVerdict:
    """One sample's verdict for the whole family; ``member`` where it is FALSIFIED."""

    sample: SampleVerdict
    member: Member | None = None


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
