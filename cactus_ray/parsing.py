"""Frozen dataclasses from plain data: strict, and with the key's path in every refusal.

Every field carries its range in ``metadata``, from which both this parser and the editor's JSON schema are made.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

from cactus_ray.errors import ConfigError

T = typing.TypeVar("T")
FRACTION = r"[0-9]{1,9}/[1-9][0-9]{0,8}"
"""Of pixel values, as everybody writes them: 8/255. So few digits that no quotient overflows."""
_hints = functools.cache(typing.get_type_hints)  # annotations are texts, and putting them into types takes milliseconds


def setting(default: Any = MISSING, *, doc: str, choices: tuple[str | int, ...] = (), **limits: Any) -> Any:
    """A field with its allowed values.

    ``limits``: minimum, maximum, exclusive_minimum, exclusive_maximum; ``word``: text that stands for None;
    ``fraction``: a number may also be written as text such as 8/255; ``pattern``: a regular expression that all of a
    text must match, and ``expected``, the same in words.
    """
    metadata = {"doc": doc, "choices": choices, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: plain(v) for f in fields(value) if (v := getattr(value, f.name)) is not None}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of any configuration dataclass, without None."""
    return typing.cast(dict[str, Any], plain(config))


def parse(kind: type[T], data: Any, path: str = "") -> T:
    """Build a configuration dataclass from plain data.

    Raises ConfigError for an unknown or missing key, a wrong type (a bool is no number), NaN or infinity, and a value
    outside the field's range; ``path`` prefixes the keys in messages.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(path or "(top)", data, f"a mapping with keys {', '.join(f.name for f in fields(kind))}")  # type: ignore[arg-type]
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = _hints(kind)  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(_join(path, key), data[key], f"no such key; one of {', '.join(known)}")
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = convert(hints[name], data[name], spec.metadata, _join(path, name))
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(_join(path, name), None, f"a value ({spec.metadata['doc']})")
    try:
        return kind(**values)
    except ConfigError as error:
        prefix = "" if path == "" or error.path.startswith(path) else f"{path}."
        raise ConfigError(prefix + error.path, error.value, error.expected) from None


def convert(hint: Any, value: Any, metadata: Mapping[str, Any], path: str) -> Any:
    """``value`` as the annotated type, checked against the field's choices and limits; ConfigError otherwise."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value == metadata.get("word")):
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if is_dataclass(hint):
        return parse(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        repeated = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or (not repeated and len(value) != len(arguments)):
            raise ConfigError(path, value, f"a list of {'' if repeated else f'{len(arguments)} '}numbers")
        return tuple(convert(arguments[0], v, metadata, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if metadata.get("fraction") and isinstance(value, str) and re.fullmatch(FRACTION, value):
        above, below = value.split("/")
        value = int(above) / int(below)
    if type(value) is not hint:
        raise ConfigError(path, value, describe(hint, metadata))
    if metadata.get("choices") and value not in metadata["choices"]:
        raise ConfigError(path, value, describe(hint, metadata))
    if hint in (int, float) and not _in_range(value, metadata):
        raise ConfigError(path, value, describe(hint, metadata))
    if hint is str and "pattern" in metadata and not re.fullmatch(metadata["pattern"], value):
        raise ConfigError(path, value, describe(hint, metadata))
    return value


def _in_range(value: float, limits: Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and value >= limits.get("minimum", -math.inf)
        and value <= limits.get("maximum", math.inf)
        and value > limits.get("exclusive_minimum", -math.inf)
        and value < limits.get("exclusive_maximum", math.inf)
    )


def describe(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What would be right, in words: "a finite number in (0.0, 1.0]" or "one of adam, sgd"."""
    if metadata.get("choices"):
        return f"one of {', '.join(map(str, metadata['choices']))}"
    if hint is str and "pattern" in metadata:
        return str(metadata["expected"])
    if hint not in (int, float):
        return {str: "text", bool: "true or false"}.get(hint, str(hint))
    low, high = metadata.get("minimum"), metadata.get("maximum")
    low_text = f"[{low}" if low is not None else f"({metadata.get('exclusive_minimum', '-inf')}"
    high_text = f"{high}]" if high is not None else f"{metadata.get('exclusive_maximum', 'inf')})"
    limited = any(k in metadata for k in ("minimum", "maximum", "exclusive_minimum", "exclusive_maximum"))
    word = f"{metadata['word']} or " if "word" in metadata else ""
    kind = "a whole number" if hint is int else "a finite number"
    fraction = ", or a fraction such as 8/255" if metadata.get("fraction") else ""
    return f"{word}{kind}{f' in {low_text}, {high_text}' if limited else ''}{fraction}"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
