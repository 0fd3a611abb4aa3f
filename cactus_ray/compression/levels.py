"""The grammar of a level: how a network is compressed.

``dense``, or up to three steps in this order, joined by ``+``: ``prune:FAMILY:SPARSITY`` or ``lr+sparse:KEPT``,
``rebn``, and one of the number formats in ``FORMATS``: ``int4`` is symmetric with one scale per output channel,
``int4:tensor`` has one scale per tensor, ``int4:affine`` an integer zero point, ``int4:tensor:affine`` both;
``codebook:4`` has 16 values per tensor, 0 among them. These change weights only; ``w8a8`` is integer inference: weights
as in ``int8``, and activations are rounded as well.

``lr+sparse:KEPT``: weights are U V + C with at most KEPT times as many nonzeros in U, V and C as there were weights. A
format then rounds U, V and C: symmetric integers or codebooks; without one they have 12 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from cactus_ray.config import PRUNE_FAMILIES, STORED_BITS
from cactus_ray.errors import ConfigError

INTEGER_BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "ternary": 2}
_AFFINE = ("int8", "int6", "int5", "int4", "int3", "int2")  # of 2 bits, it has four codes and not three
_BITS = INTEGER_BITS | {"int2": 2}
INTEGER_INFERENCE = "w8a8"
_SYMMETRIC = (*INTEGER_BITS, *(f"{name}:tensor" for name in INTEGER_BITS))
_CODEBOOK_BITS = {f"codebook:{bits}": bits for bits in reversed(STORED_BITS)}
FORMATS = (
    "fp16", "bf16", *_SYMMETRIC,
    *(f"{name}{scales}:affine" for scales in ("", ":tensor") for name in _AFFINE),
    *_CODEBOOK_BITS,
    INTEGER_INFERENCE,
)  # fmt: skip
FACTOR_FORMATS = (*_SYMMETRIC, *_CODEBOOK_BITS)
"""Formats of the parts of ``lr+sparse``."""

_NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Level:
    """One level. ``str(level)`` is its canonical text, which ``parse_level`` reads back to an equal level."""

    prune_family: str | None = None
    sparsity: float | None = None
    rebn: bool = False
    quantise: str | None = None
    kept: float | None = None

    def __str__(self) -> str:
        steps = []
        if self.prune_family is not None and self.sparsity is not None:
            steps.append(f"prune:{self.prune_family}:{_shortest(self.sparsity)}")
        if self.kept is not None:
            steps.append(f"lr+sparse:{_shortest(self.kept)}")
        if self.rebn:
            steps.append("rebn")
        if self.quantise is not None:
            steps.append(self.quantise)
        return "+".join(steps) or "dense"

    @property
    def bits(self) -> int | None:
        """Bits of a weight's code, or None where weights are stored as floating point."""
        if self.quantise in _CODEBOOK_BITS:
            return _CODEBOOK_BITS[self.quantise]
        return 8 if self.integer_inference else _BITS.get((self.quantise or "").partition(":")[0])

    @property
    def codebook(self) -> bool:
        """Whether codes are places in a table of values, one table per tensor."""
        return self.quantise in _CODEBOOK_BITS

    @property
    def per_tensor(self) -> bool:
        """Whether all channels of a tensor share one scale."""
        return ":tensor" in (self.quantise or "")

    @property
    def affine(self) -> bool:
        """Whether codes are counted from an integer zero point."""
        return (self.quantise or "").endswith(":affine")

    @property
    def integer_inference(self) -> bool:
        """Whether activations are quantised as well, with static scales, so that layers compute in integers."""
        return self.quantise == INTEGER_INFERENCE

    @property
    def structured(self) -> bool:
        """Whether whole channels are removed."""
        return self.prune_family is not None and self.prune_family[1] == "s"

    @property
    def needs_calibration(self) -> bool:
        """Whether materialising needs calibration images."""
        by_gradient = self.prune_family is not None and self.prune_family.endswith("-grad")
        return self.rebn or self.integer_inference or by_gradient


def parse_level(text: object, path: str = "level") -> Level:
    """The level that ``text`` writes.

    Raises ConfigError (with ``path``, the text and what would be right) for an unknown step, a wrong order, a step
    given twice, a sparsity outside [0, 1), a share kept outside (0, 1], and a format that ``lr+sparse`` has no use for.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(path, text, "text like 'dense', 'int8' or 'prune:gu-l1:0.7+rebn+int8'")
    steps = _steps(text)
    if steps == ["dense"]:
        return Level()
    ranks = [_rank(step, text, path) for step in steps]
    if ranks != sorted(set(ranks)):
        raise ConfigError(
            path, text,
            "at most one each of prune:FAMILY:SPARSITY or lr+sparse:KEPT, rebn and a number format, in this order",
        )  # fmt: skip
    family, sparsity, quantise, kept = None, None, None, None
    for rank, step in zip(ranks, steps, strict=True):
        if rank == 0 and step.startswith("prune"):
            family, sparsity = _prune(step, text, path)
        elif rank == 0:
            kept = _kept(step, text, path)
        elif rank == 2:
            quantise = step
    if kept is not None and quantise is not None and quantise not in FACTOR_FORMATS:
        raise ConfigError(path, text, f"lr+sparse:KEPT alone (12 bits) or with one of {', '.join(FACTOR_FORMATS)}")
    return Level(family, sparsity, 1 in ranks, quantise, kept)


def _steps(text: str) -> list[str]:
    """The steps of a level; the sign inside of ``lr+sparse`` joins none."""
    found: list[str] = []
    for step in (part.strip() for part in text.split("+")):
        if found and found[-1] == "lr":
            found[-1] = f"lr+{step}"
        else:
            found.append(step)
    return found


def parse_levels(texts: Iterable[object], path: str = "levels") -> tuple[Level, ...]:
    """Distinct levels in the given order. Raises ConfigError for a bad or repeated one, or none at all."""
    found: list[Level] = []
    for i, text in enumerate(texts):
        level = parse_level(text, f"{path}[{i}]")
        if level in found:
            raise ConfigError(
                f"{path}[{i}]", text, f"a level not yet listed ({level} stands at [{found.index(level)}])"
            )
        found.append(level)
    if not found:
        raise ConfigError(path, [], "at least one level, for example 'dense'")
    return tuple(found)


def _rank(step: str, text: str, path: str) -> int:
    if step.partition(":")[0] in ("prune", "lr+sparse", "lr"):
        return 0
    if step == "rebn":
        return 1
    if step in FORMATS:
        return 2
    if step == "dense":
        raise ConfigError(path, text, "'dense' to stand alone")
    name = step.partition(":")[0]
    if bits := _BITS.get(name):
        same = [f for f in FORMATS if _BITS.get(f.partition(":")[0]) == bits]
        raise ConfigError(path, text, f"{bits} bits as one of {', '.join(same)}; {step!r} is none of them")
    if name.startswith("codebook"):
        raise ConfigError(path, text, f"one of {', '.join(_CODEBOOK_BITS)} (bits); {step!r} is none of them")
    plain = ", ".join(f for f in FORMATS if ":" not in f)
    steps = (
        f"dense, prune:FAMILY:SPARSITY, lr+sparse:KEPT, rebn, {plain} (integers also with :tensor, :affine or"
        " :tensor:affine), codebook:BITS"
    )
    raise ConfigError(path, text, f"steps out of {steps}, joined by '+'; {step!r} is none of them")


def _prune(step: str, text: str, path: str) -> tuple[str, float]:
    parts = step.split(":")
    if len(parts) != 3:
        raise ConfigError(path, text, "pruning as prune:FAMILY:SPARSITY, for example prune:gu-l1:0.7")
    _, family, number = parts
    if family not in PRUNE_FAMILIES:
        raise ConfigError(path, text, f"a pruning family out of {', '.join(PRUNE_FAMILIES)}; got {family!r}")
    if not _NUMBER.fullmatch(number) or not float(number) < 1.0:
        raise ConfigError(path, text, f"a sparsity of at least 0 and below 1; got {number!r}")
    return family, float(number)


def _kept(step: str, text: str, path: str) -> float:
    name, _, number = step.partition(":")
    if name != "lr+sparse" or not number:
        raise ConfigError(path, text, "low rank plus sparse as lr+sparse:KEPT, for example lr+sparse:0.1")
    if not _NUMBER.fullmatch(number) or not 0.0 < float(number) <= 1.0:
        raise ConfigError(path, text, f"a share of the dense weights above 0 and at most 1; got {number!r}")
    return float(number)


def _shortest(value: float) -> str:
    """Shortest decimal text that reads back as the same float, never in scientific notation: 0.5, 0, 0.00001."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
