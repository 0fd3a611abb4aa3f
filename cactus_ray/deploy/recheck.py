"""Verifying a certificate again from its files alone: nothing that it says is believed.

What is recomputed: the identity of the file, the digest of the data, every figure of the summary, every CERTIFIED
verdict (by bounds on the weights read from the file), every counterexample (in onnxruntime), the standard accuracy and
the parity. Compared word by word: what the verdicts are said to mean, and the card. What cannot be is in
``NOT_CHECKED``, and is said.
Nothing is chosen by what is found here, so this reading of the test split is not counted as a use of it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.compression.size import macs
from cactus_ray.config import DataConfig, parse
from cactus_ray.data import DataSet, load, subset
from cactus_ray.deploy import document as doc
from cactus_ray.deploy.again import ample_settings, of_family, of_file
from cactus_ray.deploy.card import render
from cactus_ray.deploy.consistency import inconsistencies
from cactus_ray.deploy.labels import network_labels, onnx_labels
from cactus_ray.deploy.replay import PARITY_TOLERANCE, Logits, answers, margins, parity, runner
from cactus_ray.deploy.statements import misstatements
from cactus_ray.errors import UserError
from cactus_ray.interchange.nodes import INPUT
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import unpack

MODEL, TENSORS, CARD = "model.onnx", "model.safetensors", "card.md"
PARITY_FACTOR = 8.0
"""How many times the stated parity may be found here: machines sum in other orders, by which it changes severalfold."""
NOT_CHECKED = (
    "how the network was made: network.model and the training configuration in model.safetensors (only that they "
    "agree), network.dense_bytes, and that compressing the network as network.level says gives this file",
    "provenance: study, trial, commit, how often the test split was used, what was required, and the figures on the "
    "selection split beyond their sums",
    "UNKNOWN verdicts, which claim nothing of their samples, and which stage decided the others",
    "versions, engine.version, engine.self_test, the effort in engine.settings, seconds, and, where activations are "
    "quantised, the differences in file.parity",
)
"""What a certificate says that its files and the data do not show."""
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
            "standard_accuracy": self.standard_accuracy, "not_checked": list(NOT_CHECKED),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Deployed:
    """The file as it is read and as it runs."""

    graph: Graph
    params: Params
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
    findings += misstatements(document, deployed.graph)
    settings = ample_settings(document, findings)
    about = deployed.graph, deployed.params, deployed.run
    itself, family = of_file(*about, document, settings), of_family(*about, document, settings)
    rows = itself.addressed(document.verdicts, labels)
    try:
        accuracy = _accuracy(document, rows, images, labels, deployed, findings)
        replayed, again = itself.recompute(rows, images, labels, progress)
        findings += itself.findings
        if family is not None and document.family is not None:
            rows = family.addressed(document.family.verdicts, labels)
            more = family.recompute(rows, images, labels, progress)
            replayed, again = replayed + more[0], again + more[1]
            findings += family.findings
    except UserError as error:  # the file loads, but does not run or runs as another network than was read
        return CheckReport(folder, (*findings, str(error)), document)
    if not findings:  # else it is the card of a certificate that does not hold
        findings += _card(folder / CARD, document)
    return CheckReport(folder, tuple(findings), document, again, replayed, accuracy)


def _card(path: Path, document: doc.Document) -> list[str]:
    """Where the page for people is not what follows from the certificate, byte by byte."""
    try:
        stated = path.read_bytes()
    except OSError as error:
        return [f"{CARD}: cannot be read ({error.strerror})"]
    meant = render(document).encode()
    if stated == meant:
        return []
    lines = stated.decode(errors="replace").splitlines(), meant.decode().splitlines()
    for number, (line, expected) in enumerate(itertools.zip_longest(*lines), start=1):
        if line != expected:
            return [f"{CARD}: line {number} is {line!r}; the certificate gives {expected!r}"]
    return [f"{CARD}: differs from what the certificate gives in its line ends"]


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
        graph, params, _ = read_onnx(content)
        deployed = _Deployed(graph, params, runner(content))
    except UserError as error:
        findings.append(f"{MODEL}: {error}")
        return None
    if tuple(graph.input_shape) != document.network.inputs.shape:
        findings.append(f"network.inputs.shape: {document.network.inputs.shape}; the file reads {graph.input_shape}")
    if document.network.inputs.name != INPUT:
        findings.append(f"network.inputs.name: {document.network.inputs.name!r}; expected {INPUT!r}")
    if document.network.macs is not None and (counted := macs(graph, params)) != document.network.macs:
        findings.append(f"network.macs: {document.network.macs}, but the file needs {counted}")
    findings += [f"{MODEL}: {problem}" for problem in onnx_labels(content, document, graph)]
    findings += _tensors(folder / TENSORS, deployed, document)
    return deployed


def _tensors(path: Path, deployed: _Deployed, document: doc.Document) -> list[str]:
    """Where model.safetensors is not the network of model.onnx, bit by bit, or comes from another configuration."""
    try:
        content = path.read_bytes()
        network = unpack(content, str(path))
    except OSError as error:
        return [f"{TENSORS}: cannot be read ({error.strerror})"]
    except UserError as error:
        return [str(error)]
    if network.graph.to_json() != deployed.graph.to_json():
        return [f"{TENSORS}: holds another graph than {MODEL}"]
    if network.params.keys() != deployed.params.keys():
        return [f"{TENSORS}: holds other tensors than {MODEL}"]
    differing = [k for k, v in deployed.params.items() if not torch.equal(v, network.params[k])]
    found = [f"{TENSORS}: {', '.join(differing)} differ from {MODEL}"] if differing else []
    found += [f"{TENSORS}: {problem}" for problem in network_labels(network, content, document)]
    stated = document.provenance.config_hash
    if network.config is not None and stated is not None and network.config.config_hash != stated:
        found.append(f"provenance.config_hash: {stated}, but {TENSORS} comes from {network.config.config_hash}")
    if network.config is not None:
        model = network.config.model.name or str(network.config.model.factory)
        if model != document.network.model:
            found.append(f"network.model: {document.network.model!r}, but {TENSORS} is said to be {model!r}")
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
    here = parity(deployed.graph, deployed.params, images[chosen], logits)
    findings += _parity(document, deployed.graph, here, logits)
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


def _parity(document: doc.Document, graph: Graph, here: doc.Parity, logits: Tensor) -> list[str]:
    """Where the file is said to be nearer to our own forward pass than rounding can make it on any machine.

    Beside a quantiser's tie rounding decides between two codes, so that figures of two machines do not compare.
    """
    stated, place = document.file.parity, "file.parity"
    if stated is None:
        return [f"{place}: missing; here {here.samples} images differ by at most {here.max_abs_difference}"]
    found = []
    if stated.samples != here.samples:
        found.append(f"{place}.samples: {stated.samples}, but there are {here.samples} verdicts")
    if has_quantisers(graph):
        return found
    largest = logits.abs().max()
    last_place = float(torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest)
    low = (here.max_abs_difference - last_place) / PARITY_FACTOR
    high = PARITY_TOLERANCE * max(1.0, float(largest))
    if not low <= stated.max_abs_difference <= high:
        found.append(
            f"{place}.max_abs_difference: {stated.max_abs_difference}, but here it is {here.max_abs_difference}"
        )
    first, second = logits.double().topk(min(2, logits.shape[1])).values[:, [0, -1]].unbind(1)
    ties = int((first - second <= 4 * max(stated.max_abs_difference, here.max_abs_difference)).sum())
    if stated.class_disagreements > ties:
        found.append(
            f"{place}.class_disagreements: {stated.class_disagreements}, but here it is {here.class_disagreements}, "
            f"and in {ties} images two classes are near enough to each other"
        )
    return found
