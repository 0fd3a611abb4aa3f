"""The values that one searched parameter can take: W&B's sweep grammar without its conditions.

Every value is checked against the type and range of the key of ``RunConfig`` that it sets before anything runs.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from typing import Any

from cactus_ray.config import RunConfig, convert, describe
from cactus_ray.errors import ConfigError

DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values")


@dataclass(frozen=True, slots=True)
class Key:
    """A key of ``RunConfig``: its type (without ``| None``) and the limits from its field."""

    hint: Any
    metadata: Mapping[str, Any]

    def convert(self, value: Any, path: str) -> Any:
        """``value`` as this key's type; ConfigError if it is null, of another type or out of range."""
        if value is None:
            raise ConfigError(path, value, describe(self.hint, self.metadata))
        return convert(self.hint, value, self.metadata, path)


@dataclass(frozen=True, slots=True)
class Choices:
    """One of these values, in the order written."""

    values: tuple[Any, ...]

    def contains(self, value: Any) -> bool:
        return any(type(v) is type(value) and v == value for v in self.values)

    def ends(self) -> tuple[Any, ...]:
        return self.values

    def to_dict(self) -> dict[str, Any]:
        plain = [list(v) if isinstance(v, tuple) else v for v in self.values]
        return {"values": plain}


@dataclass(frozen=True, slots=True)
class Range:
    """An interval, both ends included. With ``q``: the multiples of q inside it."""

    low: float
    high: float
    distribution: str
    integer: bool
    q: float | None = None

    @property
    def log(self) -> bool:
        return "log" in self.distribution

    @property
    def multiples(self) -> tuple[int, int]:
        """Smallest and largest k with low <= k * q <= high."""
        q = _exact(self.q or 1)
        return math.ceil(_exact(self.low) / q), math.floor(_exact(self.high) / q)

    def value(self, k: int) -> float:
        """k * q without the noise of binary multiplication: 3 * 0.1 is 0.3."""
        product = k * _exact(self.q or 1)
        return int(product) if self.integer else float(product)

    def share(self, value: float) -> float:
        """Where ``value`` lies, from 0 at the low end to 1 at the high one, on the range's own scale."""
        low, high, v = (math.log(x) if self.log else float(x) for x in (self.low, self.high, value))
        return (v - low) / (high - low) if high > low else 0.0

    def contains(self, value: Any) -> bool:
        if type(value) is not (int if self.integer else float) or not self.low <= value <= self.high:
            return False
        if self.distribution == "int_uniform":
            return float(value).is_integer()
        return self.q is None or self.value(round(value / self.q)) == value

    def ends(self) -> tuple[Any, ...]:
        kind = int if self.integer else float
        if self.q is None:
            return kind(self.low), kind(self.high)
        return tuple(self.value(k) for k in self.multiples)

    def to_dict(self) -> dict[str, Any]:
        plain = {"distribution": self.distribution, "min": self.low, "max": self.high}
        return plain | ({"q": self.q} if self.distribution.startswith("q_") else {})


@functools.cache
def run_keys() -> Mapping[str, Key]:
    """Every key of ``RunConfig`` that holds a value, by dotted name."""
    return types.MappingProxyType(dict(leaf_keys(RunConfig)))


def leaf_keys(kind: type, prefix: str = "") -> Iterable[tuple[str, Key]]:
    """Dotted names and types of a configuration dataclass, nested ones included."""
    hints = typing.get_type_hints(kind)
    for spec in fields(kind):
        hint = hints[spec.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
        if is_dataclass(hint):
            yield from leaf_keys(typing.cast(type, hint), f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, Key(hint, spec.metadata)


# --- from plain data -----------------------------------------------------------------------------------------------


def parse_domain(spec: Mapping[str, Any], path: str, key: Key) -> Choices | Range:
    """The values that ``spec`` describes for ``key``; ConfigError for any that could not be drawn or not be used."""
    given = [k for k in ("value", "values") if k in spec] + (["min"] if {"min", "max"} & set(spec) else [])
    if len(given) != 1:
        raise ConfigError(path, dict(spec), "exactly one of value, values, or min and max")
    if given[0] == "min":
        return _range(spec, path, key)
    for other in (k for k in ("distribution", "q") if k in spec):
        raise ConfigError(f"{path}.{other}", spec[other], f"nothing beside {given[0]}; it belongs to min and max")
    if given[0] == "value":
        return Choices((key.convert(spec["value"], f"{path}.value"),))
    values = spec["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}.values", values, "a list of at least one value")
    converted = [key.convert(v, f"{path}.values[{i}]") for i, v in enumerate(values)]
    for i, value in enumerate(converted):
        if value in converted[:i]:
            raise ConfigError(f"{path}.values[{i}]", values[i], "each value once")
    return Choices(tuple(converted))


def _range(spec: Mapping[str, Any], path: str, key: Key) -> Range:
    if key.hint not in (int, float) or key.metadata.get("choices"):
        raise ConfigError(path, dict(spec), f"value or values: this key is {describe(key.hint, key.metadata)}")
    for end in ("min", "max"):
        if end not in spec:
            raise ConfigError(f"{path}.{end}", None, f"a number: {'max' if end == 'min' else 'min'} stands alone")
    whole = all(type(spec[end]) is int for end in ("min", "max"))
    distribution = spec.get("distribution", "int_uniform" if whole else "uniform")
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"{path}.distribution", distribution, f"one of {', '.join(DISTRIBUTIONS)}")
    if key.hint is float and whole and "distribution" not in spec:
        # W&B would draw only whole numbers here, which hardly anybody means for a key that takes fractions.
        hint = f"{float(spec['min'])} for a continuous range, or distribution: int_uniform for whole numbers only"
        raise ConfigError(f"{path}.min", spec["min"], hint)
    if key.hint is int and distribution in ("uniform", "log_uniform_values"):
        whole_ones = "int_uniform, or q_uniform or q_log_uniform_values with q: 1"
        raise ConfigError(f"{path}.distribution", distribution, f"{whole_ones}: this key is a whole number")
    low, high = (key.convert(spec[end], f"{path}.{end}") for end in ("min", "max"))
    if not low < high:
        raise ConfigError(f"{path}.min", spec["min"], f"less than max = {spec['max']} (a fixed one is written value:)")
    if "log" in distribution and low <= 0:
        raise ConfigError(f"{path}.min", spec["min"], "more than 0 on a logarithmic scale")
    if distribution == "int_uniform" and not (float(low).is_integer() and float(high).is_integer()):
        raise ConfigError(f"{path}.min", [spec["min"], spec["max"]], "whole numbers for int_uniform")
    step = 1 if distribution == "int_uniform" else _step(spec, path, key, distribution)
    found = Range(low, high, distribution, key.hint is int, step)
    if step is not None and found.multiples[0] > found.multiples[1]:
        raise ConfigError(f"{path}.q", step, f"a multiple of q between min = {low} and max = {high}")
    return found


def _step(spec: Mapping[str, Any], path: str, key: Key, distribution: str) -> float | None:
    quantised = distribution.startswith("q_")
    if quantised != ("q" in spec):
        expected = (
            f"a number: {distribution} draws multiples of q" if quantised else f"nothing: {distribution} has no q"
        )
        raise ConfigError(f"{path}.q", spec.get("q"), expected)
    if not quantised:
        return None
    q: float = convert(key.hint, spec["q"], {"exclusive_minimum": 0.0}, f"{path}.q")
    return q


def _exact(value: float) -> Decimal:
    return Decimal(repr(value))
