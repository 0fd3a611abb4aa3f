"""Verifying a certificate again from its files alone: nothing that it says is believed.

What is recomputed: the identity of the file, the digest of the data, every figure of the summary, every CERTIFIED
verdict (by bounds on the weights read from the file), every counterexample (in onnxruntime) and the standard accuracy.
What cannot be: where the network comes from, its figures on the selection split, versions and seconds.
Nothing is chosen by what is found here, so this reading of the test split is not counted as a use of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.size import macs
from cactus_ray.config import DataConfig, parse
from cactus_ray.data import DataSet, load, subset
from cactus_ray.deploy import document as doc
from cactus_ray.deploy.consistency import inconsistencies
from cactus_ray.deploy.replay import Logits, answers, margins, objection, parity, runner
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import load as load_network
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.soundness import SoundnessError
from cactus_ray.verification.verdict import Verdict, VerificationSettings

MODEL, TENSORS = "model.onnx", "model.safetensors"
BOUND_TOLERANCE = 1e-6
"""How much larger, relative to itself (at least 1), a stated lower bound may be than the recomputed one: machines sum
in other orders."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything that was found wrong (``findings``; empty: the certificate holds) and how much was recomputed."""

    folder: Path
    findings: tuple[str, ...]
    document: doc.Document | None
    certified_again: int = 0
    replayed: int = 0
    standard_accuracy: float | None = None

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "ok": self.ok, "findings": list(self.findings),
            "certified_again": self.certified_again, "replayed": self.replayed,
            "standard_accuracy": self.standard_accuracy,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Deployed:
    """The file as it is read and as it runs."""

    graph: Graph
    params: Params
    metadata: dict[str, Any]
    run: Logits


def check(folder: Path, *, root: str | None = None, progress: Progress | None = None) -> CheckReport:
    """Verify the files of a pick again; ``root``: folder of the data set where it is not inside a package.

    Every deviation becomes a finding; a file that is broken or hostile is a finding too. Raises UserError only where
    there is no certificate to check, or the data that it names cannot be loaded here.
    """
    path = folder / doc.NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {doc.NAME} in it; expected a folder written by pick")
    try:
        document = doc.read(path)
    except UserError as error:
        return CheckReport(folder, (str(error),), None)
    findings = inconsistencies(document)
    images, labels = _samples(document, root, findings)
    deployed = _file(folder, document, findings)
    if deployed is None:
        return CheckReport(folder, tuple(findings), document)
    if images.shape[1:] != deployed.graph.input_shape:
        findings.append(
            f"model.onnx: reads images {deployed.graph.input_shape}; the data are {tuple(images.shape[1:])}"
        )
        return CheckReport(folder, tuple(findings), document)
    classes = deployed.graph.shapes(deployed.params)[deployed.graph.output.name]
    if classes != (len(document.network.classes),):
        findings.append(f"model.onnx: gives {classes} logits; network.classes has {len(document.network.classes)}")
        return CheckReport(folder, tuple(findings), document)
    rows = _addressed(document, labels, findings)
    try:
        accuracy = _accuracy(document, rows, images, labels, deployed, findings)
        replayed = _replay(document, rows, images, deployed.run, findings)
        again = _certify(document, rows, images, labels, deployed, findings, progress)
    except UserError as error:  # the file loads, but does not run or runs as another network than was read
        return CheckReport(folder, (*findings, str(error)), document)
    return CheckReport(folder, tuple(findings), document, again, replayed, accuracy)


def _samples(document: doc.Document, root: str | None, findings: list[str]) -> tuple[Tensor, Tensor]:
    """The real images and labels of the split that the certificate names."""
    data = document.data
    size = document.network.inputs.shape[1] if data.name == "image_folder" else None
    loaded: DataSet = load(parse(DataConfig, {"name": data.name, "root": root, "image_size": size}), (data.split,))
    images, labels = loaded.split(data.split)
    if loaded.digests[data.split] != data.digest:
        findings.append(f"data.digest: {data.digest}, but the {data.split} split here has {loaded.digests[data.split]}")
    if len(labels) != data.total:
        findings.append(f"data.total: {data.total}, but the {data.split} split here has {len(labels)} samples")
    if loaded.class_names != document.network.classes:
        findings.append(f"network.classes: {list(document.network.classes)}; the data have {list(loaded.class_names)}")
    if sorted(data.indices) != subset(len(labels), min(data.samples, len(labels))).tolist():
        findings.append("data.indices: neither the whole split nor its fixed random subset of that size")
    return images, labels


def _file(folder: Path, document: doc.Document, findings: list[str]) -> _Deployed | None:
    """model.onnx, compared with what the certificate and model.safetensors say of it; None where it is unusable."""
    if document.file.name != MODEL:
        findings.append(f"file.name: {document.file.name!r}; expected {MODEL!r}")
    try:
        content = (folder / MODEL).read_bytes()
    except OSError as error:
        findings.append(f"{MODEL}: cannot be read ({error.strerror})")
        return None
    digest = hashlib.sha256(content).hexdigest()
    if digest != document.file.sha256:
        findings.append(f"{MODEL}: its SHA-256 is {digest}, the certificate is about {document.file.sha256}")
    if len(content) != document.file.bytes:
        findings.append(f"{MODEL}: has {len(content)} bytes, the certificate says {document.file.bytes}")
    try:
        graph, params, metadata = read_onnx(content)
        deployed = _Deployed(graph, params, metadata, runner(content))
    except UserError as error:
        findings.append(f"{MODEL}: {error}")
        return None
    if tuple(graph.input_shape) != document.network.inputs.shape:
        findings.append(f"network.inputs.shape: {document.network.inputs.shape}; the file reads {graph.input_shape}")
    if document.network.macs is not None and (counted := macs(graph, params)) != document.network.macs:
        findings.append(f"network.macs: {document.network.macs}, but the file needs {counted}")
    findings += _metadata(document, metadata)
    findings += _tensors(folder / TENSORS, deployed, document)
    return deployed


def _metadata(document: doc.Document, metadata: dict[str, Any]) -> list[str]:
    """Where the certificate describes another network than the file describes itself."""
    stated: dict[str, object] = {
        "cactus_ray.level": document.network.level,
        "cactus_ray.data": document.data.name,
        "cactus_ray.class_names": list(document.network.classes),
        "cactus_ray.domain": list(document.threat.domain),
        "cactus_ray.input": document.network.inputs.layout,
    }
    found = []
    for key, expected in stated.items():
        text = metadata.get(key)
        try:
            value = json.loads(text) if text is not None and isinstance(expected, list) else text
        except ValueError:
            value = text
        if value != expected:
            found.append(f"{MODEL}: its metadata {key} is {value!r}; the certificate says {expected!r}")
    return found


def _tensors(path: Path, deployed: _Deployed, document: doc.Document) -> list[str]:
    """Where model.safetensors is not the network of model.onnx, bit by bit, or comes from another configuration."""
    try:
        network = load_network(path)
    except UserError as error:
        return [str(error)]
    if network.graph.to_json() != deployed.graph.to_json():
        return [f"{TENSORS}: holds another graph than {MODEL}"]
    if network.params.keys() != deployed.params.keys():
        return [f"{TENSORS}: holds other tensors than {MODEL}"]
    differing = [k for k, v in deployed.params.items() if not torch.equal(v, network.params[k])]
    found = [f"{TENSORS}: {', '.join(differing)} differ from {MODEL}"] if differing else []
    stated = document.provenance.config_hash
    if network.config is not None and stated is not None and network.config.config_hash != stated:
        found.append(f"provenance.config_hash: {stated}, but {TENSORS} comes from {network.config.config_hash}")
    return found


def _addressed(document: doc.Document, labels: Tensor, findings: list[str]) -> list[doc.Row]:
    """The rows that name a sample of the split, each once; wrong labels are findings and then not relied on."""
    rows = {row.index: row for row in document.verdicts if row.index < len(labels)}
    found = []
    for row in rows.values():
        label = int(labels[row.index])
        if row.label != label:
            findings.append(f"verdicts: index {row.index}: label {row.label}, but the sample has {label}")
        found.append(replace(row, label=label))
    return found


def _accuracy(
    document: doc.Document, rows: list[doc.Row], images: Tensor, labels: Tensor, deployed: _Deployed,
    findings: list[str],
) -> float | None:  # fmt: skip
    """Standard accuracy of the file on the certificate's samples, compared with the stated one."""
    if not rows:
        return None
    chosen = torch.tensor([row.index for row in rows])
    logits = answers(deployed.run, images[chosen])
    parity(deployed.graph, deployed.params, images[chosen], logits)
    right = margins(logits, labels[chosen]) > 0
    accuracy = int(right.sum()) / len(rows)
    if abs(accuracy - document.summary.standard_accuracy) > 1e-9:
        findings.append(f"summary.standard_accuracy: {document.summary.standard_accuracy}, but the file has {accuracy}")
    for row, ok in zip(rows, right.tolist(), strict=True):
        if ok == (row.decided_by == doc.CLEAN):
            answer = "rightly" if ok else "wrongly"
            findings.append(
                f"verdicts: index {row.index}: decided by {row.decided_by!r}, but the file classifies it {answer}"
            )
    return accuracy


def _replay(document: doc.Document, rows: list[doc.Row], images: Tensor, run: Logits, findings: list[str]) -> int:
    """Replay every counterexample; returns how many hold."""
    held = 0
    for row in rows:
        if row.verdict != Verdict.FALSIFIED or row.counterexample is None:
            continue
        reason = objection(run, images[row.index], row.label, row.counterexample, document.threat)
        if reason is None:
            held += 1
        else:
            findings.append(f"verdicts: index {row.index}: the counterexample {reason}")
    return held


def _certify(
    document: doc.Document, rows: list[doc.Row], images: Tensor, labels: Tensor, deployed: _Deployed,
    findings: list[str], progress: Progress | None,
) -> int:  # fmt: skip
    """Certify every CERTIFIED sample again; returns how many are. Time is ample: a limit is no evidence."""
    settings = _settings(document, findings)
    claimed, held = [row for row in rows if row.verdict == Verdict.CERTIFIED], 0
    for start in range(0, len(claimed), settings.batch_size):
        part = claimed[start : start + settings.batch_size]
        indices = [row.index for row in part]
        chosen = torch.tensor(indices)
        try:
            found = verify(
                deployed.graph, deployed.params, images[chosen], labels[chosen], indices, document.threat, settings
            )
        except SoundnessError as error:
            findings.append(f"verdicts: the verifier contradicts itself: {error}")
            continue
        for row, again in zip(part, found, strict=True):
            held += again.verdict == Verdict.CERTIFIED
            findings += _compare(row, again.verdict, again.decided_by, again.lower_bound)
        if progress is not None:
            progress("certifying again", start + len(part), len(claimed))
    return held


def _settings(document: doc.Document, findings: list[str]) -> VerificationSettings:
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


def _compare(row: doc.Row, verdict: Verdict, decided_by: str, bound: float | None) -> list[str]:
    place = f"verdicts: index {row.index}"
    if verdict != Verdict.CERTIFIED:
        return [f"{place}: CERTIFIED, but the file's weights give {verdict} (decided by {decided_by})"]
    stated = row.lower_bound
    if stated is not None and bound is not None and stated > bound + BOUND_TOLERANCE * max(1.0, abs(bound)):
        return [f"{place}: lower bound {stated}, but the file's weights give only {bound}"]
    return []
