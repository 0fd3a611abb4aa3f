"""Certifying a file: the weights are read back from it, every counterexample is replayed in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.family import Family
from cactus_ray.compression.size import macs
from cactus_ray.config import DataConfig, ThreatConfig, to_dict
from cactus_ray.data import DataSet, load, subset
from cactus_ray.deploy.document import (
    CLEAN,
    REPLAY,
    SCHEMA_VERSION,
    SEARCHED,
    DataSection,
    Document,
    Engine,
    FamilySection,
    InputSection,
    NetworkSection,
    Parity,
    Provenance,
    Row,
    Soundness,
    Summary,
    file_section,
    summarise,
    versions,
)
from cactus_ray.deploy.members import member_objection, words
from cactus_ray.deploy.recheck import CheckReport, check
from cactus_ray.deploy.replay import Logits, answers, margins, objection, parity, runner
from cactus_ray.deploy.statements import SCHEMES, assumptions
from cactus_ray.errors import UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.verification import engine
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.family import FamilyVerdict, verify_family
from cactus_ray.verification.member import Member, Subject
from cactus_ray.verification.verdict import Verdict, VerificationSettings

__all__ = ["Certification", "CheckReport", "Progress", "certify_file", "check", "document", "parity"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, of how many)."""


@dataclass(frozen=True, slots=True)
class Certification:
    """What was found about one file on one split.

    ``graph`` and ``params`` are what was read from the file and certified; ``rows`` one verdict per sample.
    """

    file: bytes
    graph: Graph
    params: Params
    metadata: Mapping[str, Any]
    data: DataSection
    class_names: tuple[str, ...]
    threat: ThreatConfig
    settings: VerificationSettings
    parity: Parity
    rows: tuple[Row, ...]
    summary: Summary


def certify_file(
    file: bytes,
    data: DataConfig,
    split: str,
    threat: ThreatConfig,
    settings: VerificationSettings,
    *,
    samples: int | None = None,
    progress: Progress | None = None,
    known: Mapping[int, Row] | None = None,
    keep: Callable[[Sequence[Row]], None] | None = None,
    family: Family | None = None,
) -> Certification:
    """Verdicts for a fixed random subset of ``samples`` (None: all) of a split, on the weights read from an ONNX file.

    FALSIFIED is only said where the counterexample replays in onnxruntime; where the file itself misclassifies the
    sample, the sample is the counterexample. ``known``: rows of an earlier run with the same arguments, by index, that
    are not computed again; ``keep`` is given new ones as they come. ``family``: verdicts on every network around the
    file's at once; FALSIFIED by a member that is written to a file and replays, too. Raises UserError where the file or
    the data cannot be read or do not fit each other, RunFailedError where our reading of the file answers differently
    from onnxruntime.
    """
    graph, params, metadata = read_onnx(file)
    run = runner(file)
    loaded = load(data, (split,))
    all_images, all_labels = loaded.split(split)
    refuse_misfit(graph, params, loaded)
    chosen = subset(len(all_labels), samples)
    images, labels, indices = fitted(all_images[chosen], graph), all_labels[chosen], chosen.tolist()
    logits = answers(run, images)
    agreement = parity(graph, params, images, logits)
    right = (margins(logits, labels) > 0).tolist()
    claims = _Claims(graph, params, run, threat, settings, family)
    done = {index: known[index] for index in indices if index in known} if known else {}
    for position, index in enumerate(indices):
        if index in done:
            _refuse_contradiction(done[index], int(labels[position]), right[position])
    waiting = [p for p, index in enumerate(indices) if index not in done]
    for start in range(0, len(waiting), settings.batch_size):
        part = waiting[start : start + settings.batch_size]
        new = claims.rows(images[part], labels[part], [indices[p] for p in part], [right[p] for p in part])
        done.update((row.index, row) for row in new)
        if keep is not None:
            keep(new)
        if progress is not None:
            progress(f"certifying the {split} split", len(done), len(indices))
    rows = [done[index] for index in indices]
    section = DataSection(
        name=data.name, split=split, digest=loaded.digests[split], total=len(all_labels), samples=len(indices),
        indices=tuple(indices),
    )  # fmt: skip
    return Certification(
        file, graph, params, metadata, section, loaded.class_names, threat, settings, agreement, tuple(rows),
        summarise(rows),
    )  # fmt: skip


def _refuse_contradiction(row: Row, label: int, right: bool) -> None:
    """Raise UserError for a known verdict that cannot be of this file on this sample."""
    clean = row.verdict == Verdict.FALSIFIED and row.decided_by == CLEAN
    if row.label == label and clean != right:
        return
    found = f"class {row.label}, {row.verdict} by {row.decided_by}"
    here = f"class {label}, which the file itself answers {'rightly' if right else 'wrongly'}"
    raise UserError(f"known verdict of sample {row.index}: got {found}; expected one of {here}")


def document(
    certification: Certification, model: str, level: str, provenance: Provenance, *,
    name: str = "model.onnx", dense_bytes: int | None = None,
) -> Document:  # fmt: skip
    """The certificate of a certification. ``model`` and ``level`` name the network, ``provenance`` its origin."""
    arithmetic, bounds = certification.settings.arithmetic, engine.info(certification.settings.engine)
    inputs = InputSection(name="image", layout="NCHW", shape=_shape(certification.graph), dtype="float32")
    network = NetworkSection(
        model=model, level=level, inputs=inputs, classes=certification.class_names,
        macs=macs(certification.graph, certification.params), dense_bytes=dense_bytes,
    )  # fmt: skip
    return Document(
        schema_version=SCHEMA_VERSION,
        file=file_section(name, certification.file, certification.parity),
        network=network,
        data=certification.data,
        threat=certification.threat,
        soundness=Soundness(
            scheme=SCHEMES[certification.settings.engine],
            arithmetic=arithmetic,
            assumptions=assumptions(certification.graph, arithmetic),
        ),
        engine=Engine(
            name=bounds.name,
            version=bounds.version,
            settings=to_dict(certification.settings),
            self_test=bounds.self_test,
        ),
        versions=versions(),
        summary=certification.summary,
        verdicts=certification.rows,
        provenance=provenance,
    )


def family_section(certification: Certification, family: Family) -> FamilySection:
    """What a certificate says of a family, from the certification of its centre with that family."""
    return FamilySection(
        family=family, members=words(family), summary=certification.summary, verdicts=certification.rows
    )


def _shape(graph: Graph) -> tuple[int, int, int]:
    channels, height, width = graph.input_shape
    return channels, height, width


def fitted(images: Tensor, graph: Graph) -> Tensor:
    """Images [N, C, H, W] in the shape that the network reads: for one that reads flat features, flattened."""
    return images.reshape(len(images), *graph.input_shape)


def refuse_misfit(graph: Graph, params: Params, data: DataSet) -> None:
    """Raises UserError where a network does not read the images of a data set or has another number of classes."""
    flat = math.prod(graph.input_shape) == max(graph.input_shape) == math.prod(data.input_shape)
    if tuple(graph.input_shape) != data.input_shape and not flat:
        raise UserError(f"the network reads images {graph.input_shape}; {data.name} has {data.input_shape}")
    classes = graph.shapes(params)[graph.output.name]
    if classes != (data.classes,):
        raise UserError(f"the network gives {classes} logits; {data.name} has {data.classes} classes")


@dataclass(frozen=True, slots=True)
class _Claims:
    """What is asked of a file: its own verdicts, or those of the family around it."""

    graph: Graph
    params: Params
    run: Logits
    threat: ThreatConfig
    settings: VerificationSettings
    family: Family | None

    def rows(self, images: Tensor, labels: Tensor, indices: Sequence[int], right: Sequence[bool]) -> list[Row]:
        """Rows of some samples; ``right``: whether the file itself classifies them rightly."""
        batch = images, labels, indices, self.threat, self.settings
        if self.family is None:
            found = [FamilyVerdict(v) for v in verify(self.graph, self.params, *batch)]
        else:
            found = verify_family(self.graph, self.params, *batch, self.family)
        return [self.row(*each) for each in zip(found, images, right, strict=True)]

    def row(self, found: FamilyVerdict, image: Tensor, right: bool) -> Row:
        """The verdict as it holds for files: FALSIFIED only where the file, or that of the member, is wrong."""
        sample = found.sample
        bound = None if sample.decided_by in SEARCHED else sample.lower_bound
        row = Row(
            index=sample.index, label=sample.label, verdict=str(sample.verdict),
            lower_bound=bound if bound is not None and math.isfinite(bound) else None,
            decided_by=sample.decided_by, seconds=round(sample.seconds, 6), counterexample=None,
        )  # fmt: skip
        if not right:
            itself, centre = tuple(image.flatten().tolist()), None if self.family is None else Member(kind="centre")
            return replace(
                row, verdict=str(Verdict.FALSIFIED), decided_by=CLEAN, lower_bound=None, counterexample=itself,
                member=centre,
            )  # fmt: skip
        if sample.verdict != Verdict.FALSIFIED:
            return row
        if sample.counterexample is None or self.objection(found, image, sample.counterexample) is not None:
            return replace(row, verdict=str(Verdict.UNKNOWN), decided_by=REPLAY, lower_bound=None)
        return replace(row, counterexample=sample.counterexample, member=found.member)

    def objection(self, found: FamilyVerdict, image: Tensor, point: Sequence[float]) -> str | None:
        """Why a point is no counterexample for the file (of the member), or None where it is one."""
        if self.family is None or found.member is None or found.member.kind == "centre":
            return objection(self.run, image, found.sample.label, point, self.threat)
        around = Subject.of(self.graph, self.params, self.family)
        return member_objection(around, found.member, image, found.sample.label, point, self.threat)
