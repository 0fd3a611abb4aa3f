"""``--set key=value``: fix a parameter or set a key of a search space from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cactus_ray.errors import ConfigError
from cactus_ray.search.document import read_yaml
from cactus_ray.search.domains import Choices, Key, leaf_keys, run_keys
from cactus_ray.search.parameters import Parameter, check_used
from cactus_ray.search.settings import KEYS, RUN_SECTIONS, SECTIONS, section_of


def override_value(key: str, text: Any) -> Any:
    """The value of ``--set key=text``, read as YAML."""
    return read_yaml(text, f"--set {key}") if isinstance(text, str) else text


def overridden(
    raw: dict[str, Any], parameters: tuple[Parameter, ...], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Parameter, ...]]:
    """The plain space and its parameters with every override in its place.

    A key of a parameter fixes it; otherwise a key of a section, a whole top-level key, or a key of RunConfig outside
    the sections is set, and null takes a section's key away. Raises ConfigError naming ``--set`` for anything else,
    also for a new parameter that no possible method reads.
    """
    by_name = {p.name: p for p in parameters}
    known = set(by_name)
    for key, value in overrides.items():
        path, section, _, name = f"--set {key}", *key.partition(".")
        if key in by_name or (key in run_keys() and section not in RUN_SECTIONS):
            choice = Choices((run_keys()[key].convert(value, path),))
            by_name[key] = replace(by_name[key], domain=choice) if key in by_name else Parameter(key, choice)
        elif name and section in SECTIONS:
            keys: dict[str, Key | None] = dict(leaf_keys(SECTIONS[section]))
            if section in ("verification", "search"):
                keys["samples" if section == "verification" else "points"] = None
            if name not in keys:
                raise ConfigError(path, value, f"no such key; one of {', '.join(f'{section}.{k}' for k in keys)}")
            spec = keys[name]
            if value is not None and spec is not None:
                spec.convert(value, path)
            raw[section] = _with(section_of(raw, section), name, value)
        elif key in KEYS and key != "parameters":
            raw[key] = value
        else:
            names = [*(k for k in KEYS if k != "parameters"), *(k for k in run_keys() if "." not in k)]
            names += [f"{s}.KEY for the keys of {s}" for s in (*SECTIONS, "compression_set")]
            raise ConfigError(path, value, f"no such key; one of {', '.join(names)}")
    for name in by_name.keys() - known:
        check_used(by_name[name], by_name, f"--set {name}")
    return raw, tuple(by_name.values())


def _with(section: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A section with the key of this dotted name set, or taken away by None."""
    first, _, rest = name.partition(".")
    found = {key: v for key, v in section.items() if key != first}
    if rest:
        inner = section.get(first)
        return found | {first: _with(inner if isinstance(inner, Mapping) else {}, rest, value)}
    return found if value is None else found | {first: value}
