"""Configurations that are tried first: ``search.points`` of a space, and what ``cactus-ray suggest`` queues."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cactus_ray.errors import ConfigError
from cactus_ray.search.domains import run_keys
from cactus_ray.search.parameters import METHOD_KEYS, Parameter, shown, uses
from cactus_ray.search.store import append_line

if TYPE_CHECKING:
    from cactus_ray.search.space import Space

FILE = "suggestions.jsonl"
Point = dict[str, Any]
logger = logging.getLogger(__name__)


def parse_points(data: Any, parameters: Sequence[Parameter], path: str = "search.points") -> tuple[Point, ...]:
    """Points from a list of mappings, of dotted or nested parameter names to values.

    Raises ConfigError for a name that is no parameter, a value outside its domain, and one that no trial with the
    point's other values would be asked for.
    """
    if data is None:
        return ()
    example = "a list of mappings such as [{method: sabr, learning_rate: 0.005}]"
    if not isinstance(data, list):
        raise ConfigError(path, data, example)
    found = []
    for i, entry in enumerate(data):
        if not isinstance(entry, Mapping) or not entry:
            raise ConfigError(f"{path}[{i}]", entry, example)
        found.append(parse_point(entry, parameters, f"{path}[{i}]."))
    return tuple(found)


def parse_point(
    data: Mapping[str, Any], parameters: Sequence[Parameter], prefix: str, shared: Mapping[str, Any] | None = None
) -> Point:
    """One point; ``prefix`` names the place of a key in errors, ``shared`` are the values that all trials have."""
    by_name = {p.name: p for p in parameters}
    point: Point = {}
    for name, value in _flat(data):
        path = f"{prefix}{name}"
        if name not in by_name:
            raise ConfigError(path, value, f"a searched parameter: {', '.join(by_name) or 'this space has none'}")
        plain = run_keys()[name].convert(value, path)
        if not by_name[name].domain.contains(plain):
            raise ConfigError(path, value, f"a value that {name} can take: {shown(by_name[name].domain)}")
        point[name] = plain
    for name in point:
        if reason := _idle(by_name[name], {**(shared or {}), **point}, by_name):
            raise ConfigError(f"{prefix}{name}", point[name], f"nothing: {reason}")
    return point


def fitted_points(points: Iterable[Point], fixed: Mapping[str, Any], left: Sequence[Parameter]) -> tuple[Point, ...]:
    """Points without the values that are ``fixed`` anyhow. One that ``--set`` contradicts is left out, as is a
    repetition, and one of which nothing is left."""
    domains = {p.name: p.domain for p in left}
    found: list[Point] = []
    for point in points:
        if any(name in fixed and fixed[name] != value for name, value in point.items()):
            continue
        kept = {name: value for name, value in point.items() if name in domains}
        if kept and kept not in found and all(domains[name].contains(value) for name, value in kept.items()):
            found.append(kept)
    return tuple(found)


def plain_points(points: Iterable[Point]) -> list[Point]:
    """Points as YAML and JSON write them."""
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in point.items()} for point in points]


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in data.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat


def _idle(parameter: Parameter, values: Mapping[str, Any], by_name: Mapping[str, Parameter]) -> str | None:
    """Why no trial with these values is asked for the parameter; None where one may be."""
    for name, allowed in parameter.when:
        if name in values and values[name] not in allowed:
            return f"it is asked for only with {name} {' or '.join(map(str, allowed))}, not {values[name]}"
    method, loss = values.get("method"), values.get("certified_loss")
    undecided = (method is None and "method" in by_name) or (loss is None and "certified_loss" in by_name)
    if undecided and method in (None, "cactus"):
        return None
    if parameter.name.split(".")[0] in METHOD_KEYS and not uses(parameter.name, method or "cactus", loss):
        return f"method {method or 'cactus'} does not read it" + (f" with certified_loss {loss}" if loss else "")
    return None


# --- what is suggested by hand -------------------------------------------------------------------------------------


def suggest(run: Path, point: Point) -> None:
    """Append a point to the queue of a run. Its driver, now or later, takes it up before the next trial."""
    append_line(run / FILE, {"values": plain_points([point])[0], "time": time.time()})


class Suggested:
    """The queue of a run as its driver reads it. What was tried already is known to the sampler, so nothing has to be
    marked as taken, and only ``cactus-ray suggest`` ever writes the file."""

    def __init__(self, run: Path, space: Space) -> None:
        self.file, self.space, self.offset = run / FILE, space, 0

    def new(self) -> list[Point]:
        """Points that were appended since the last call. A line that does not fit the space is logged and left out."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        found = []
        for line in filter(None, whole.split(b"\n")):
            try:
                found.append(check_point(self.space, json.loads(line)["values"]))
            except (ValueError, KeyError, TypeError, ConfigError) as error:
                logger.warning("%s: a line is left out: %s", self.file, error)
        return found


def check_point(space: Space, values: Mapping[str, Any], prefix: str = "") -> Point:
    """``values`` as a point of a resolved space; values that the space fixes may stand there, too."""
    fixed = dict(_flat({k: v for k, v in space.base.items() if k not in ("data", "threat")}))
    left = {}
    for name, value in _flat(values):
        if name in fixed:
            plain = run_keys()[name].convert(value, f"{prefix}{name}")
            known = tuple(fixed[name]) if isinstance(fixed[name], list) else fixed[name]
            if plain != known:
                raise ConfigError(f"{prefix}{name}", value, f"{fixed[name]}, which is fixed in this study")
        else:
            left[name] = value
    shared: dict[str, Any] = {k: space.base[k] for k in ("method", "certified_loss") if k in space.base}
    return parse_point(left, space.parameters, prefix, shared)
