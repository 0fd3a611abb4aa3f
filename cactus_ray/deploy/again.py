"""Recomputing the verdicts of a certificate: of the file itself, and of the family around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import parse_level
from cactus_ray.config import parse
from cactus_ray.deploy import document as doc
from cactus_ray.deploy import wording
from cactus_ray.deploy.members import member_objection, refuse_integers
from cactus_ray.deploy.replay import Logits, objection
from cactus_ray.errors import ConfigError
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.family import verify_family
from cactus_ray.verification.member import Subject
from cactus_ray.verification.soundness import SoundnessError
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

Judge = Callable[[Tensor, Tensor, Sequence[int]], list[SampleVerdict]]
"""Verdicts on images, labels and their indices, of the file or of the family around it."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of verdicts of a certificate and what it is about; ``part``: where it stands, for findings.

    ``objection``: why a row's counterexample is none, or None. ``exceeds``: whether a stated bound is more than what
    was found again allows. ``findings`` collects everything that is wrong.
    """

    part: str
    judge: Judge
    objection: Callable[[doc.Row, Tensor], str | None]
    settings: VerificationSettings
    exceeds: Callable[[float, float], bool]
    findings: list[str] = field(default_factory=list)

    def addressed(self, rows: Sequence[doc.Row], labels: Tensor) -> list[doc.Row]:
        """The rows that name a sample of the split, each once; wrong labels are findings and then not relied on."""
        found = []
        for row in {row.index: row for row in rows if row.index < len(labels)}.values():
            label = int(labels[row.index])
            if row.label != label:
                self.find(row, f"label {row.label}, but the sample has {label}")
            found.append(replace(row, label=label))
        return found

    def recompute(
        self, rows: Sequence[doc.Row], images: Tensor, labels: Tensor, progress: Progress | None
    ) -> tuple[int, int]:  # fmt: skip
        """Replay and certify; returns how many of each hold."""
        return self.replay(rows, images), self.certify(rows, images, labels, progress)

    def replay(self, rows: Sequence[doc.Row], images: Tensor) -> int:
        """Replay every counterexample; returns how many hold."""
        held = 0
        for row in rows:
            if row.verdict != Verdict.FALSIFIED or row.counterexample is None:
                continue
            reason = self.objection(row, images[row.index])
            if reason is None:
                held += 1
            else:
                self.find(row, f"the counterexample {reason}")
        return held

    def certify(self, rows: Sequence[doc.Row], images: Tensor, labels: Tensor, progress: Progress | None) -> int:
        """Certify every CERTIFIED sample again; returns how many are. Time is ample: a limit is no evidence."""
        claimed, held = [row for row in rows if row.verdict == Verdict.CERTIFIED], 0
        for start in range(0, len(claimed), self.settings.batch_size):
            part = claimed[start : start + self.settings.batch_size]
            indices = [row.index for row in part]
            chosen = torch.tensor(indices)
            try:
                found = self.judge(images[chosen], labels[chosen], indices)
            except SoundnessError as error:
                self.findings.append(f"{self.part}verdicts: the verifier contradicts itself: {error}")
                continue
            for row, again in zip(part, found, strict=True):
                held += again.verdict == Verdict.CERTIFIED
                self.compare(row, again)
            if progress is not None:
                progress(f"certifying {self.part}again", start + len(part), len(claimed))
        return held

    def compare(self, row: doc.Row, again: SampleVerdict) -> None:
        """Find where a row claims more than was found again."""
        stated, bound = row.lower_bound, again.lower_bound
        if again.verdict != Verdict.CERTIFIED:
            self.find(row, f"CERTIFIED, but the file's weights give {again.verdict} (decided by {again.decided_by})")
        elif stated is not None and bound is not None and self.exceeds(stated, bound):
            self.find(row, f"lower bound {stated}, but the file's weights give only {bound}")

    def find(self, row: doc.Row, problem: str) -> None:
        """Add a finding about a row."""
        self.findings.append(f"{self.part}verdicts: index {row.index}: {problem}")


def of_file(
    graph: Graph, params: Params, run: Logits, document: doc.Document, settings: VerificationSettings
) -> Table:  # fmt: skip
    """The verdicts of the file itself."""
    threat = document.threat

    def refuted(row: doc.Row, image: Tensor) -> str | None:
        return objection(run, image, row.label, row.counterexample or (), threat)

    def judge(images: Tensor, labels: Tensor, indices: Sequence[int]) -> list[SampleVerdict]:
        return verify(graph, params, images, labels, indices, threat, settings)

    return Table("", judge, refuted, settings, wording.of(document).exceeds)


def of_family(
    graph: Graph, params: Params, run: Logits, document: doc.Document, settings: VerificationSettings
) -> Table | None:  # fmt: skip
    """The verdicts of the family around the file, with what is wrong in what it is said to be; None without one."""
    if document.family is None:
        return None
    family, threat, said = document.family.family, document.threat, wording.of(document)
    around = Subject.of(graph, params, family)

    def refuted(row: doc.Row, image: Tensor) -> str | None:
        if row.member is None or row.member.kind == "centre":
            return objection(run, image, row.label, row.counterexample or (), threat)
        return member_objection(around, row.member, image, row.label, row.counterexample or (), threat)

    def judge(images: Tensor, labels: Tensor, indices: Sequence[int]) -> list[SampleVerdict]:
        return [f.sample for f in verify_family(graph, params, images, labels, indices, threat, settings, family)]

    table = Table("family.", judge, refuted, settings, said.exceeds)
    if document.family.members != (meant := said.words(family)):
        table.findings.append(f"family.members: {document.family.members!r}, but family.family means {meant!r}")
    try:
        refuse_integers(parse_level(document.network.level, "network.level"), family, "network.level")
    except ConfigError as error:
        table.findings.append(str(error))
    return table


def ample_settings(document: doc.Document, findings: list[str]) -> VerificationSettings:
    """The settings with ample time, with attacks no stronger than usual, in the arithmetic that is claimed.

    Attacks can only find what is false; a stranger's certificate must not make them run for hours. Branch and bound
    gets several times what it had, because it is slower on a busy machine; no other stage has a limit.
    """
    usual = VerificationSettings()
    try:
        stated = parse(VerificationSettings, document.engine.settings, "engine.settings")
    except ConfigError as error:
        findings.append(str(error))
        stated = usual
    arithmetic = document.soundness.arithmetic
    if document.engine.settings.get("arithmetic", "real") != arithmetic:
        findings.append(f"soundness.arithmetic: {arithmetic}, but engine.settings decided in another one")
    seconds = min(5.0 * (stated.seconds_per_sample or 10.0), 600.0) if stated.bound == "branch" else 0.0
    return replace(
        stated, arithmetic=arithmetic, seconds_per_sample=seconds,
        attack_steps=min(stated.attack_steps, usual.attack_steps), restarts=min(stated.restarts, usual.restarts),
        targeted_runs=min(stated.targeted_runs, usual.targeted_runs),
    )  # fmt: skip
