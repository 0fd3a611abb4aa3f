"""From a run to a folder that can be deployed: choose, write the file, certify that file, say how it went.

The order matters: the choice is made on the selection split; then the test split is read once, for the chosen network
alone, and that use is recorded beside the run. Whatever the test split says, no other network is tried. Where the
network is a file of its own, there is nothing to choose, and the use is recorded beside the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cactus_ray.compression.family import Family
from cactus_ray.compression.levels import parse_level
from cactus_ray.config import DataConfig, RunConfig, parse
from cactus_ray.data import load
from cactus_ray.deploy import certificate as certify
from cactus_ray.deploy import document as doc
from cactus_ray.deploy.card import render
from cactus_ray.deploy.pick import Choice, Point, choose
from cactus_ray.deploy.requirements import COLUMNS, Requirements, option, show, unmet
from cactus_ray.errors import RunFailedError, UserError
from cactus_ray.models.network import Network, pack, unpack
from cactus_ray.models.network import load as load_network
from cactus_ray.outputs import try_files, unwritable
from cactus_ray.search.evaluate import LevelNetwork, at_level
from cactus_ray.search.space import load_space
from cactus_ray.search.store import Records, TrialRecord, read_records
from cactus_ray.verification.verdict import VerificationSettings

FILES = ("model.onnx", "model.safetensors", "card.md", doc.NAME)
"""What a folder of a pick holds, in the order in which it is written: without a certificate it is not complete."""
WRITTEN = (*FILES, *(f"{name}.part" for name in FILES))
USES = "test_split_uses.jsonl"


@dataclass(frozen=True, slots=True)
class PickResult:
    """What was chosen, what the test split says of it, and where the files are.

    ``not_met``: requirements that the figures of the test split miss; the files are written all the same and say so.
    ``choice`` and ``selection`` are None where the network is a file of its own.
    """

    choice: Choice | None
    folder: Path
    document: doc.Document
    selection: doc.Summary | None
    not_met: tuple[str, ...]

    @property
    def met(self) -> bool:
        return not self.not_met

    def lines(self) -> list[str]:
        """What the user is told, one sentence each."""
        network = self.document.network
        of_file = f"{network.model} at {network.level}: {self.document.file.bytes:,} bytes"
        found = [of_file] if self.choice is None else self.choice.lines()
        for split, summary in (("selection", self.selection), (self.document.data.split, self.document.summary)):
            found += [] if summary is None else [f"{split} split: {doc.sentence(summary)}"]
        if (whole := self.document.family) is not None:
            found.append(f"{self.document.data.split} split, {whole.members}: {doc.sentence(whole.summary)}")
        figures = doc.measured(self.document)
        limits = {} if self.choice is None else self.choice.requirements.limits()
        found += [
            f"not met on the {self.document.data.split} split: {option(key)} {show(key, limits[key])} "
            f"(here {show(key, figures[COLUMNS[key]])})"
            for key in self.not_met
        ]
        uses = self.document.provenance.test_split_uses
        of = "network file" if self.choice is None else "run"
        return [*found, f"use {uses} of the test split of this {of}", f"written to {self.folder}"]

    def to_json(self) -> dict[str, Any]:
        return {
            "choice": self.choice and self.choice.to_json(), "folder": str(self.folder), "met": self.met,
            "not_met": list(self.not_met), "selection": self.selection and asdict(self.selection),
            self.document.data.split: asdict(self.document.summary),
            "bytes": self.document.file.bytes, "sha256": self.document.file.sha256,
            **({"family": asdict(whole.summary)} if (whole := self.document.family) is not None else {}),
            "test_split_uses": self.document.provenance.test_split_uses,
        }  # fmt: skip


def pick(
    run: Path,
    requirements: Requirements,
    out: Path,
    *,
    samples: int | None = None,
    settings: VerificationSettings | None = None,
    root: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    family: Callable[[str], Family] | None = None,
) -> PickResult:
    """Choose on the selection split, write the files of that one network, certify its file on the test split.

    ``samples``: certify only a fixed random subset of the test split; ``settings``: default, those of the study;
    ``root``: folder of the data set, default the study's. ``family`` gives, by level, a family around the file whose
    members are certified all at once, too; it may refuse the level (ConfigError). Raises NothingFits (and then neither
    reads the test split nor writes anything) and UserError; a folder ``out`` that cannot be written, or holds anything
    but an earlier pick, is refused before.
    """
    refuse_foreign(out)
    try_files(out, *(out / name for name in WRITTEN))
    records = read_records(run)
    choice = choose(*_at_hand(run, records, requirements))
    trial, level = records.trials[choice.point["trial"]], str(choice.point["level"])
    around = None if family is None else family(level)
    config = parse(RunConfig, trial.config)
    if parse_level(level).needs_calibration:  # on other images it would not be the network that the search saw
        records.refuse_other_data(run, load(_data(config, root), ("train",)))
    subject = _Subject.of(_checkpoint(run, trial), config, level, root)
    _same_size(subject.deployed.file, choice.point)
    if settings is None:
        settings = load_space(run / "space.yaml").verification
    selection = selection_figures(choice.point)
    provenance = doc.Provenance(
        study=records.study.get("name"), trial=trial.id, config_hash=trial.config_hash,
        commit=records.study.get("commit"), selection=selection, requirements=requirements,
    )  # fmt: skip
    subject.refuse_unstatable(provenance)
    uses = record_use(run / USES, trial.id, level, subject.deployed.file, samples)
    provenance = replace(provenance, test_split_uses=uses)
    document = _certified(subject, provenance, out, settings, around, samples=samples, progress=progress)
    return PickResult(choice, out, document, selection, document.provenance.not_met or ())


def pick_file(
    file: Path,
    level: str,
    out: Path,
    *,
    samples: int | None = None,
    settings: VerificationSettings | None = None,
    root: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    family: Callable[[str], Family] | None = None,
) -> PickResult:
    """The same for one network file, as ``train`` writes it, at one level: nothing is chosen, so nothing is required.

    ``settings``: default, those of a search space that says nothing. Uses of the test split are recorded and counted
    in a file beside the network. Raises UserError for a file that cannot be read or does not say on what and against
    what it was trained.
    """
    refuse_foreign(out)
    try_files(out, *(out / name for name in WRITTEN))
    network = load_network(file)
    if network.config is None:
        raise UserError(f"{file}: does not say on what and against what it was trained; expected a file of train")
    level = str(parse_level(level))
    around = None if family is None else family(level)
    subject = _Subject.of(network, network.config, level, root)
    provenance = doc.Provenance(config_hash=network.config.config_hash)
    subject.refuse_unstatable(provenance)
    uses = record_use(file.with_suffix(f".{USES}"), None, level, subject.deployed.file, samples)
    provenance = replace(provenance, test_split_uses=uses)
    document = _certified(
        subject, provenance, out, settings or VerificationSettings(), around, samples=samples, progress=progress
    )
    return PickResult(None, out, document, None, ())


@dataclass(frozen=True, slots=True)
class _Subject:
    """The one network that is certified and written; ``dense_bytes``: of its file without compression."""

    config: RunConfig
    data: DataConfig
    level: str
    deployed: LevelNetwork
    dense_bytes: int
    classes: tuple[str, ...]

    @staticmethod
    def of(network: Network, config: RunConfig, level: str, root: str | None) -> _Subject:
        data = _data(config, root)
        deployed = at_level(network, level, data, config.threat.domain)
        dense = len(at_level(network, "dense", data, config.threat.domain).file)
        return _Subject(config, data, level, deployed, dense, network.class_names)

    @property
    def model(self) -> str:
        """The architecture, or the factory of the user's own."""
        return self.config.model.name or str(self.config.model.factory)

    def refuse_unstatable(self, provenance: doc.Provenance) -> None:
        """Raises ConfigError where its certificate would not pass its own check, before anything is certified."""
        doc.refuse_unstatable(provenance, self.model, self.level, self.classes)


def _certified(
    subject: _Subject, provenance: doc.Provenance, out: Path, settings: VerificationSettings, around: Family | None, *,
    samples: int | None, progress: Callable[[str, int, int], None] | None,
) -> doc.Document:  # fmt: skip
    """Reads the test split, certifies the file on it, compares with the requirements, and writes the folder."""
    file, config = subject.deployed.file, subject.config
    asked = file, subject.data, "test", config.threat, settings
    found = certify.certify_file(*asked, samples=samples, progress=progress)
    _same_weights(subject.deployed, found)
    whole = None
    if around is not None:
        of_all = certify.certify_file(*asked, samples=samples, progress=progress, family=around)
        whole = certify.family_section(of_all, around)
    document = certify.document(found, subject.model, subject.level, provenance, dense_bytes=subject.dense_bytes)
    if provenance.requirements is not None:
        not_met = tuple(unmet(doc.measured(document), provenance.requirements))
        document = replace(document, provenance=replace(provenance, not_met=not_met))
    document = replace(document, family=whole)
    origin = {"level": subject.level} | ({"trial": provenance.trial} if provenance.trial is not None else {})
    compressed = Network(found.graph, found.params, config, found.class_names, origin)
    write_folder(
        out,
        {
            "model.onnx": file, "model.safetensors": pack(compressed),
            "card.md": render(document).encode(), doc.NAME: doc.to_json(document).encode(),
        },
    )  # fmt: skip
    return document


def _data(config: RunConfig, root: str | None) -> DataConfig:
    return config.data if root is None else replace(config.data, root=root)


def selection_figures(point: Point) -> doc.Summary:
    """The figures of a row of points.csv, with intervals."""
    samples = int(point["samples"])
    correct = round(point["standard_accuracy"] * samples)
    return doc.figures(samples, correct, int(point["n_certified"]), int(point["n_falsified"]))


def _at_hand(run: Path, records: Records, requirements: Requirements) -> tuple[list[Point], Requirements, list[Point]]:
    """The points to choose from, those whose network was kept (all where a trial is named or none was); the others."""
    points: list[Point] = list(records.points())
    kept = {t.id for t in records.trials.values() if t.checkpoint and (run / t.checkpoint).is_file()}
    here = [p for p in points if p["trial"] in kept]
    if requirements.trial or not here:
        return points, requirements, []
    return here, requirements, [p for p in points if p["trial"] not in kept]


def _checkpoint(run: Path, trial: TrialRecord) -> Network:
    """The trained network of a trial, compared with the hash in the records."""
    if not trial.checkpoint:
        raise UserError(f"{run}: trial {trial.id} has no checkpoint; pick another with --trial")
    path = run / trial.checkpoint
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: the checkpoint of the chosen trial cannot be read ({error.strerror}); only networks on the front "
            f"are kept, so choose one of them with --trial and --level"
        ) from error
    stated = trial.sha256
    if stated is not None and hashlib.sha256(content).hexdigest() != stated:
        raise RunFailedError(f"{path}: is not the file that was recorded (SHA-256 {stated}); the run was changed")
    return unpack(content, str(path))


def _same_size(file: bytes, point: Point) -> None:
    if len(file) != point["bytes"]:
        raise RunFailedError(
            f"model.onnx has {len(file)} bytes, but the run recorded {point['bytes']} for {point['trial']} at "
            f"{point['level']}; expected the same: was the run written by another version?"
        )


def _same_weights(deployed: LevelNetwork, found: certify.Certification) -> None:
    """Raise RunFailedError unless the file holds, bit for bit, the weights and quantisers that the level asks for."""
    quantisers = [[dict(n.attributes) for n in g.nodes if n.op == "quantize"] for g in (deployed.graph, found.graph)]
    if quantisers[0] != quantisers[1]:
        raise RunFailedError("model.onnx: its quantisers of activations are not what the level asked for")
    ours, read = deployed.params, found.params
    for meant, there in zip(deployed.graph.weighted(), found.graph.weighted(), strict=True):
        for kind in ("weight", "bias"):
            a, b = ours.get(f"{meant.name}.{kind}"), read.get(f"{there.name}.{kind}")
            if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
                raise RunFailedError(f"model.onnx: {kind} of layer {meant.name!r} is not what the level asked for")


# --- the test split is read once per pick --------------------------------------------------------------------------


def record_use(path: Path, trial: str | None, level: str, file: bytes, samples: int | None) -> int:
    """Append a use of the test split to ``path`` *before* the split is read; returns how many there are now.

    Raises UserError where it cannot be written: an unrecorded use is not made.
    """
    entry = {
        "time": time.time(), "verb": "pick", "trial": trial, "level": level, "samples": samples,
        "sha256": hashlib.sha256(file).hexdigest(),
    }  # fmt: skip
    try:
        with path.open("a+b") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            return sum(bool(line.strip()) for line in stream)
    except OSError as error:
        raise UserError(f"{path}: cannot record the use of the test split ({error.strerror})") from error


# --- files ---------------------------------------------------------------------------------------------------------


def refuse_foreign(out: Path) -> None:
    """Raises UserError where ``out`` is a file, or a folder that holds anything but files of an earlier pick."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file; expected a new or empty folder, or one of an earlier pick")
        foreign = sorted(p.name for p in out.iterdir() if p.name not in WRITTEN) if out.is_dir() else []
    except OSError as error:
        raise unwritable(out, error) from error
    if foreign:
        raise UserError(
            f"--out {out}: holds {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}; expected a new or empty "
            f"folder, or one of an earlier pick"
        )


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a pick so that a crash never leaves a certificate beside files that it is not about.

    All new files are on disk before the old certificate goes; the new one comes last. Raises UserError where they
    cannot be written: then an earlier pick is as it was.
    """
    partial = {name: out / f"{name}.part" for name in FILES}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, path in partial.items():
            with path.open("wb") as stream:
                stream.write(files[name])
                stream.flush()
                os.fsync(stream.fileno())
        (out / doc.NAME).unlink(missing_ok=True)
        for name, path in partial.items():
            path.replace(out / name)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):  # what went wrong with the folder is already said
                path.unlink(missing_ok=True)
