"""What a picked network must satisfy: requirements, how their texts are read, and how far figures are from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Any

from cactus_ray.compression.levels import parse_level
from cactus_ray.deploy.patterns import MOST, NAMED
from cactus_ray.errors import ConfigError

PREFERENCES = {
    "certified": ("certified_accuracy", "bytes", "standard_accuracy"),
    "accuracy": ("standard_accuracy", "certified_accuracy", "bytes"),
    "bytes": ("bytes", "certified_accuracy", "standard_accuracy"),
}
"""Columns by which points are sorted, best first; ties are broken by the next, at last by trial and level."""

COLUMNS = {"max_bytes": "bytes", "min_certified": "certified_accuracy", "min_accuracy": "standard_accuracy"}
"""The column that each requirement limits."""

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def parse_size(text: str | int, path: str = "--max-bytes") -> int:
    """Bytes of "40k", "40kB", "1.5M" or "40000"; k = 1,000 bytes. ConfigError for anything else or less than 1 byte."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([kKmMgG]?)[bB]?", str(text).strip())
    size = 0 if match is None else int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if isinstance(text, bool) or not 1 <= size <= MOST:
        raise ConfigError(path, text, "a size of at least 1 byte such as 40k, 40kB, 1.5M or 40000 (k = 1,000 bytes)")
    return size


def parse_fraction(text: str | float, path: str) -> float:
    """A fraction in [0, 1], given as such or as a percentage ("80%"). ConfigError otherwise, also for NaN."""
    expected = "a fraction in [0, 1] such as 0.8, or a percentage such as 80%"
    plain = str(text).strip()
    percent = plain.endswith("%")
    try:
        value = float(Decimal(plain[:-1].strip()) / 100) if percent else float(plain)
    except (ValueError, ArithmeticError):
        raise ConfigError(path, text, expected) from None
    if isinstance(text, bool) or not 0.0 <= value <= 1.0:
        raise ConfigError(path, text, expected)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What the picked network must satisfy on the selection split. None: not required.

    ``max_bytes``: size of ``model.onnx``; ``min_certified``, ``min_accuracy``: fractions of the samples; ``prefer``: a
    key of ``PREFERENCES``; ``trial`` and ``level`` restrict the choice. Raises ConfigError where a value is out of
    range; ``parse`` reads the texts of a command line.
    """

    max_bytes: int | None = None
    min_certified: float | None = None
    min_accuracy: float | None = None
    prefer: str = "certified"
    trial: str | None = None
    level: str | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is not None:
            parse_size(self.max_bytes)
        for key in ("min_certified", "min_accuracy"):
            if (value := getattr(self, key)) is not None:
                parse_fraction(value, option(key))
        if self.prefer not in PREFERENCES:
            raise ConfigError("--prefer", self.prefer, f"one of {', '.join(PREFERENCES)}")
        if self.trial is not None and not re.fullmatch(NAMED["pattern"], self.trial):
            raise ConfigError("--trial", self.trial, "the name of a trial such as t0007")
        if self.level is not None:
            object.__setattr__(self, "level", str(parse_level(self.level)))

    @staticmethod
    def parse(
        *, max_bytes: str | None = None, min_certified: str | float | None = None,
        min_accuracy: str | float | None = None, prefer: str = "certified",
        trial: str | None = None, level: str | None = None,
    ) -> Requirements:  # fmt: skip
        """Requirements from texts such as "40k" and "80%"."""
        return Requirements(
            max_bytes=None if max_bytes is None else parse_size(max_bytes),
            min_certified=None if min_certified is None else parse_fraction(min_certified, "--min-certified"),
            min_accuracy=None if min_accuracy is None else parse_fraction(min_accuracy, "--min-accuracy"),
            prefer=prefer,
            trial=trial,
            level=level,
        )

    def limits(self) -> dict[str, float]:
        """The numeric requirements that were given, by key."""
        return {key: getattr(self, key) for key in COLUMNS if getattr(self, key) is not None}

    def to_json(self) -> dict[str, Any]:
        keys = (*COLUMNS, "prefer", "trial", "level")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


def unmet(figures: Mapping[str, float], requirements: Requirements) -> list[str]:
    """Keys of the requirements that these figures (columns of points.csv) miss. NaN misses."""
    return [key for key, limit in requirements.limits().items() if not violation(key, limit, figures) <= 0]


def option(key: str) -> str:
    """The command-line option of a requirement."""
    return f"--{key.replace('_', '-')}"


def show(key: str, value: float) -> str:
    """A value of a requirement as one would type it; fractions are cut, so that a figure meets its own text."""
    if COLUMNS[key] == "bytes":
        return f"{value:.0f}"
    return f"{Decimal(repr(float(value))).quantize(Decimal('0.0001'), ROUND_DOWN).normalize():f}"


def violation(key: str, limit: float, point: Mapping[str, Any]) -> float:
    """How far the point misses a limit (> 0) or stays within it (<= 0), relative to the limit."""
    value: float = point[COLUMNS[key]]
    excess = value - limit if key == "max_bytes" else limit - value
    return excess / limit if limit else excess
