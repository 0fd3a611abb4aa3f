"""``certificate.json`` as data: its parts, how it is written, and how it is read strictly.

A document that comes from elsewhere is input of a stranger: every type, range, length and pattern is checked before
anything is computed from it or shown. Into the patterns of texts no line end, escape code or markup fits. Names of
classes may be any text: whoever shows them escapes them.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cactus_ray import __version__
from cactus_ray.bounds.arithmetic import ARITHMETICS
from cactus_ray.compression.family import Family
from cactus_ray.config import ThreatConfig, parse, setting
from cactus_ray.data.sources import SOURCES
from cactus_ray.deploy.patterns import MOST, NAMED, SENTENCE, SHA256, SOFTWARE, VERSION, WORD, refuse_versions
from cactus_ray.deploy.requirements import COLUMNS, Requirements
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.verification.member import Member
from cactus_ray.verification.verdict import Verdict, wilson

SCHEMA_VERSION = 2
"""What is written. What each version says is in ``version_1``, ``version_2``."""
UNDERSTOOD = (1, 2)
NAME = "certificate.json"
CLEAN, REPLAY = "clean", "replay"
"""``decided_by`` of a sample that is misclassified as it is, and of one whose counterexample did not replay."""
SEARCHED = ("alpha", "branch")
"""``decided_by`` of proofs that were searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far the file in onnxruntime is from our own forward pass, over ``samples`` images."""

    samples: int = setting(doc="images compared", minimum=1, maximum=MOST)
    max_abs_difference: float = setting(doc="largest difference of a logit", minimum=0.0)
    class_disagreements: int = setting(doc="images with another predicted class", minimum=0, maximum=MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSection:
    name: str = setting(doc="name of the certified file", **NAMED)
    sha256: str = setting(doc="SHA-256 of the file, hexadecimal", **SHA256)
    bytes: int = setting(doc="size of the file", minimum=1, maximum=MOST)
    parity: Parity | None = setting(None, doc="comparison with our own forward pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSection:
    name: str = setting(doc="name of the input", **NAMED)
    layout: str = setting(doc="order of the dimensions", choices=("NCHW",))
    shape: tuple[int, int, int] = setting(doc="channels, height, width", minimum=1, maximum=MOST)
    dtype: str = setting(doc="element type", choices=("float32",))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSection:
    model: str = setting(
        doc="architecture",
        pattern=r"[\w.:-]{1,500}",
        expected="the name of an architecture, or package.module:function",
    )
    level: str = setting(
        doc="compression level",
        pattern=r"[a-z0-9][a-z0-9:.+-]{0,199}",
        expected="a level such as 'int8' or 'prune:gu-l1:0.7'",
    )
    inputs: InputSection = setting(doc="what the network reads")
    classes: tuple[str, ...] = setting(
        doc="names of the classes, in the order of the logits",
        pattern=r"(?s:.{1,255})",
        expected="a name of 1 to 255 characters",
    )
    macs: int | None = setting(None, doc="multiply-accumulate operations of one image", minimum=0, maximum=MOST)
    dense_bytes: int | None = setting(
        None, doc="size of the same network's file without compression", minimum=1, maximum=MOST
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    name: str = setting(doc="data set", choices=tuple(SOURCES))
    split: str = setting(doc="split of the data set", choices=("train", "selection", "test"))
    digest: str = setting(doc="SHA-256 of the split's images and labels", **SHA256)
    total: int = setting(doc="samples of the split", minimum=1, maximum=MOST)
    samples: int = setting(doc="samples with a verdict", minimum=1, maximum=MOST)
    indices: tuple[int, ...] = setting(doc="indices into the split, increasing", minimum=0, maximum=MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Soundness:
    scheme: str = setting(doc="how a sample is decided", **SENTENCE)
    arithmetic: str = setting(doc="arithmetic of the network in which the bounds hold", choices=tuple(ARITHMETICS))
    assumptions: tuple[str, ...] = setting(doc="what is taken for granted", **SENTENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    name: str = setting(doc="who computed the bounds", **NAMED)
    version: str = setting(doc="its version", pattern=VERSION.pattern, expected="a version such as 1.2.3")
    settings: dict = setting(doc="verification settings")  # type: ignore[type-arg]  # free keys
    self_test: str | None = setting(None, doc="what an engine that is not our own did on a toy network", **SENTENCE)

    def __post_init__(self) -> None:
        for key, value in self.settings.items():
            if not isinstance(value, str | int | float) or (isinstance(value, int) and abs(value) > MOST):
                raise ConfigError(f"settings.{key}", value, f"a word or a number of at most {MOST}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of the verdicts. Intervals are Wilson 95 %, the samples taken as drawn from the population.

    The true certified accuracy on these samples lies between ``certified_accuracy`` (certified / all) and
    ``certified_accuracy_upper`` ((all - falsified) / all).
    """

    samples: int = setting(doc="samples with a verdict", minimum=1, maximum=MOST)
    standard_accuracy: float = setting(doc="classified rightly / all", minimum=0.0, maximum=1.0)
    n_certified: int = setting(doc="certified", minimum=0, maximum=MOST)
    n_falsified: int = setting(doc="falsified", minimum=0, maximum=MOST)
    n_unknown: int = setting(doc="neither", minimum=0, maximum=MOST)
    certified_accuracy: float = setting(doc="certified / all", minimum=0.0, maximum=1.0)
    certified_accuracy_upper: float = setting(doc="(all - falsified) / all", minimum=0.0, maximum=1.0)
    standard_interval: tuple[float, float] = setting(doc="Wilson 95 %", minimum=0.0, maximum=1.0)
    certified_interval: tuple[float, float] = setting(doc="Wilson 95 %", minimum=0.0, maximum=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The verdict of one sample.

    ``lower_bound``: of the smallest margin over the ball; > 0 where CERTIFIED. None where a search proved that the
    margin is positive (``decided_by`` in ``SEARCHED``): how far it got is an accident of batches and of time.
    """

    index: int = setting(doc="index into the split", minimum=0, maximum=MOST)
    label: int = setting(doc="class", minimum=0, maximum=MOST)
    verdict: str = setting(doc="verdict", choices=tuple(str(v) for v in Verdict))
    lower_bound: float | None = setting(None, doc="lower bound of the margin")
    decided_by: str = setting(doc="what decided", **WORD)
    seconds: float = setting(doc="time spent", minimum=0.0)
    counterexample: tuple[float, ...] | None = setting(None, doc="an input that is classified wrongly, flattened")
    member: Member | None = setting(None, doc="of a family: which member classifies the counterexample wrongly")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySection:
    """Verdicts on every network around the certified file at once; samples, threat and settings are the document's."""

    family: Family = setting(doc="which networks: how far their weights are from the file's")
    members: str = setting(doc="the same in words", **SENTENCE)
    summary: Summary = setting(doc="figures of the verdicts")
    verdicts: tuple[Row, ...] = setting(doc="one verdict per sample, each about all members")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    study: str | None = setting(None, doc="study", **NAMED)
    trial: str | None = setting(None, doc="trial", **NAMED)
    config_hash: str | None = setting(
        None, doc="identity of the trial's configuration", pattern=r"[0-9a-f]{16}", expected="16 hexadecimal digits"
    )
    commit: str | None = setting(
        None,
        doc="commit of the code that trained",
        pattern=r"[0-9a-f]{4,64}",
        expected="a commit of Git: its hexadecimal digits, all or the first of them",
    )
    test_split_uses: int | None = setting(
        None, doc="reads of the test split by picks of this run or file", minimum=1, maximum=MOST
    )
    selection: Summary | None = setting(None, doc="figures on the selection split, on which the choice was made")
    requirements: Requirements | None = setting(None, doc="what was required")
    not_met: tuple[str, ...] | None = setting(
        None, doc="requirements that the figures of this split miss", choices=tuple(COLUMNS)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A certificate: which file, on which samples, against which threat, with which verdicts."""

    schema_version: int = setting(doc="version of this format", choices=UNDERSTOOD)
    file: FileSection = setting(doc="the certified file")
    network: NetworkSection = setting(doc="the network in it")
    data: DataSection = setting(doc="the samples")
    threat: ThreatConfig = setting(doc="the set of inputs around a sample")
    soundness: Soundness = setting(doc="what a verdict means")
    engine: Engine = setting(doc="what computed the verdicts")
    versions: dict = setting(doc="versions of the software")  # type: ignore[type-arg]
    summary: Summary = setting(doc="figures of the verdicts")
    verdicts: tuple[Row, ...] = setting(doc="one verdict per sample")
    provenance: Provenance = setting(doc="where the network comes from")
    family: FamilySection | None = setting(None, doc="verdicts on every rounding of the file's weights at once")

    def __post_init__(self) -> None:
        refuse_versions(self.versions)


def refuse_unstatable(provenance: Provenance, model: str, level: str, classes: Sequence[str]) -> None:
    """Raises ConfigError where a certificate could not state these: asked before a network is certified, not after."""
    parse(Provenance, asdict(provenance), "provenance")
    inputs = InputSection(name="image", layout="NCHW", shape=(1, 1, 1), dtype="float32")
    parse(
        NetworkSection, asdict(NetworkSection(model=model, level=level, inputs=inputs, classes=tuple(classes))),
        "network",
    )  # fmt: skip
    refuse_versions(versions())


def to_json(document: Document) -> str:
    """Text of ``certificate.json``: one part, and one verdict, per line; no NaN.

    ``counterexample``, ``member`` and ``family`` stand only where there is one; other values that are unknown are null.
    """
    plain = asdict(document)
    if plain["family"] is None:
        del plain["family"]
    else:
        plain["family"]["verdicts"] = [_present(row) for row in plain["family"]["verdicts"]]
    rows = [json.dumps(_present(row), allow_nan=False) for row in plain["verdicts"]]
    parts = {key: json.dumps(value, allow_nan=False) for key, value in plain.items()}
    parts["verdicts"] = "[\n  " + ",\n  ".join(rows) + "\n ]"
    return "{\n" + ",\n".join(f' "{key}": {value}' for key, value in parts.items()) + "\n}\n"


def _present(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("counterexample", "member") or v is not None}


def read(path: Path) -> Document:
    """The certificate of a file. UserError where it cannot be read; ConfigError (a UserError) names a bad key."""
    try:
        text = path.read_bytes().decode()
        return from_json(text, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a certificate written by pick") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error


def from_json(text: str, source: str = NAME) -> Document:
    """Inverse of ``to_json``, strict: unknown keys, wrong types, NaN, infinity and values out of range are refused.

    Raises ConfigError (a UserError) that names the key, for an unknown ``schema_version`` before anything else.
    """
    try:
        plain = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        if isinstance(plain, dict) and "schema_version" in plain:
            _refuse_version(plain["schema_version"])
        return parse(Document, plain)
    except ConfigError as error:
        raise ConfigError(error.path, _short(error.value), error.expected, source) from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{source}: not a certificate ({_short(str(error))})") from error


def _refuse_version(found: object) -> None:
    if type(found) is not int or found not in UNDERSTOOD:
        known = ", ".join(map(str, UNDERSTOOD))
        raise ConfigError("schema_version", found, f"one of {known}, which cactus-ray {__version__} understands")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(k for k, _ in pairs)}")
    return found


def _short(value: object) -> object:
    """The value, or the beginning of its text where it is long: messages are read by people."""
    text = str(value)
    return value if len(text) <= 100 else text[:100] + "..."


# --- figures -------------------------------------------------------------------------------------------------------


def figures(samples: int, n_correct: int, n_certified: int, n_falsified: int) -> Summary:
    """Summary from counts; ``samples`` >= 1."""
    return Summary(
        samples=samples,
        standard_accuracy=n_correct / samples,
        n_certified=n_certified,
        n_falsified=n_falsified,
        n_unknown=samples - n_certified - n_falsified,
        certified_accuracy=n_certified / samples,
        certified_accuracy_upper=(samples - n_falsified) / samples,
        standard_interval=_interval(n_correct, samples),
        certified_interval=_interval(n_certified, samples),
    )


def _interval(count: int, samples: int) -> tuple[float, float]:
    low, high = wilson(count, samples)
    return max(0.0, float(low)), min(1.0, float(high))


def summarise(rows: Sequence[Row]) -> Summary:
    """Summary of the verdicts. A sample is misclassified exactly where it is FALSIFIED by itself."""
    verdicts = [r.verdict for r in rows]
    wrong = sum(r.decided_by == CLEAN for r in rows)
    return figures(len(rows), len(rows) - wrong, verdicts.count("CERTIFIED"), verdicts.count("FALSIFIED"))


def measured(document: Document) -> dict[str, float]:
    """The figures of a certificate by the columns of points.csv that requirements limit."""
    summary = document.summary
    return {
        "bytes": document.file.bytes,
        "certified_accuracy": summary.certified_accuracy,
        "standard_accuracy": summary.standard_accuracy,
    }


def sentence(summary: Summary) -> str:
    """The figures in one line, both ends of the certified accuracy and their intervals."""
    standard, certified = summary.standard_interval, summary.certified_interval
    return (
        f"standard accuracy {summary.standard_accuracy:.4f} [{standard[0]:.4f}, {standard[1]:.4f}], certified accuracy "
        f"{summary.certified_accuracy:.4f} [{certified[0]:.4f}, {certified[1]:.4f}] and at most "
        f"{summary.certified_accuracy_upper:.4f}, on {summary.samples} samples ({summary.n_certified} certified, "
        f"{summary.n_falsified} falsified, {summary.n_unknown} unknown)"
    )


def file_section(name: str, data: bytes, parity: Parity | None) -> FileSection:
    """Identity of the certified bytes."""
    return FileSection(name=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), parity=parity)


def versions() -> dict[str, str]:
    """Versions of the software on which the figures depend."""
    return {"cactus-ray": __version__, "python": platform.python_version(), **{n: version(n) for n in SOFTWARE[2:]}}
