"""A search space: what is asked of a study, read strictly from YAML.

Whatever could go wrong with a configuration later is refused here, with file, key path, value and what would be right.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cactus_ray.compression.levels import parse_levels
from cactus_ray.config import (
    STRATEGIES,
    CompressionSetConfig,
    DataConfig,
    RunConfig,
    ThreatConfig,
    options_of,
    parse,
    to_dict,
)
from cactus_ray.errors import ConfigError
from cactus_ray.search import objectives
from cactus_ray.search.document import read_yaml_file
from cactus_ray.search.domains import leaf_keys
from cactus_ray.search.objectives import Constraint, Objective
from cactus_ray.search.overrides import overridden, override_value
from cactus_ray.search.parameters import METHOD_KEYS, Parameter, fixed_parts, is_active, parse_parameters
from cactus_ray.search.points import fitted_points, parse_points, plain_points
from cactus_ray.search.samplers import check_sampler
from cactus_ray.search.settings import KEYS, RUN_SECTIONS, ResourceSettings, SearchSettings, WandbSettings, section_of
from cactus_ray.verification.verdict import VerificationSettings

REQUIRED = {
    "name": "the study's name, for example digits", "data": "a mapping such as {name: digits}",
    "model": "a mapping such as {name: cnn_small}", "threat": "a mapping such as {epsilon: 0.1}",
    "levels": "a list such as [dense, int8]",
}  # fmt: skip
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SAMPLES = "selection (the whole split) or a whole number of at least 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A whole search space, resolved: every default is written out and every condition that is decided is gone.

    ``base``: plain nested keys of RunConfig that all trials share. ``levels`` and metrics are canonical. ``parameters``
    are in an order in which conditions come first. ``samples``: "selection" or a number of that split's samples.
    ``points``: values that are tried first; what a point leaves out is drawn.
    """

    name: str
    base: dict[str, Any]
    levels: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    front: dict[str, str]
    search: SearchSettings
    points: tuple[dict[str, Any], ...] = ()
    verification: VerificationSettings
    samples: str | int
    resources: ResourceSettings
    wandb: WandbSettings

    @property
    def data(self) -> DataConfig:
        return parse(DataConfig, self.base["data"], "data")

    @property
    def threat(self) -> ThreatConfig:
        return parse(ThreatConfig, self.base["threat"], "threat")

    def is_active(self, parameter: Parameter, values: Mapping[str, Any]) -> bool:
        """Whether a parameter takes part, given the active values drawn before it."""
        shared = {key: self.base[key] for key in ("method", "certified_loss") if key in self.base}
        return is_active(parameter, shared | dict(values))

    def configuration(self, values: Mapping[str, Any], number: int) -> RunConfig:
        """The run of trial ``number`` with these parameter values; inactive ones are left out, as are those that are
        not given, which then have the run's default.

        The seed is derived from (search.seed, number) unless the space sets one. Raises ConfigError for an unknown
        name or a value that does not fit.
        """
        known = {p.name for p in self.parameters}
        for name in values:
            if name not in known:
                raise ConfigError(name, values[name], f"a parameter of this space: {', '.join(sorted(known))}")
        run = copy.deepcopy(self.base)
        active: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name in values and self.is_active(parameter, active):
                active[parameter.name] = values[parameter.name]
                _put(run, parameter.name, values[parameter.name])
        used = options_of(run.get("method", "cactus"), run.get("certified_loss"))
        run = {key: value for key, value in run.items() if key not in METHOD_KEYS or key in used}
        run.setdefault("seed", trial_seed(self.search.seed, number))
        return parse(RunConfig, run)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``parse_space`` reads back to an equal space."""
        fixed = {key: value for key, value in self.base.items() if key not in RUN_SECTIONS}
        return {
            "name": self.name,
            **{key: copy.deepcopy(self.base[key]) for key in RUN_SECTIONS},
            "levels": list(self.levels),
            # what is fixed comes last, or its own conditions would change the order in which the others are drawn
            "parameters": {p.name: p.to_dict() for p in self.parameters}
            | {key: {"value": v} for key, v in _flat(fixed)},
            "objectives": [to_dict(o) for o in self.objectives],
            "constraints": [to_dict(c) for c in self.constraints],
            "front": dict(self.front),
            "search": to_dict(self.search) | ({"points": plain_points(self.points)} if self.points else {}),
            "verification": {"samples": self.samples, **to_dict(self.verification)},
            "resources": to_dict(self.resources),
            "wandb": to_dict(self.wandb),
        }


def trial_seed(seed: int, number: int) -> int:
    """Seed of trial ``number`` of a study: 31 bits of SHA-256."""
    digest = hashlib.sha256(f"trial {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


def load_space(path: str | Path, overrides: Mapping[str, str] | None = None) -> Space:
    """Read a search space. UserError or ConfigError with the file's name for anything that is not right."""
    return parse_space(read_yaml_file(Path(path)), str(path), overrides)


def parse_space(data: Any, source: str = "space", overrides: Mapping[str, str] | None = None) -> Space:
    """A search space from plain data, with ``--set key=value`` overrides (values are YAML) applied.

    An override fixes a parameter, whatever its range says, or sets a key of a section.
    """
    try:
        return _parse(data, {key: override_value(key, text) for key, text in (overrides or {}).items()})
    except ConfigError as error:
        raise (error if error.source or error.path.startswith("--set") else error.at(source)) from None


def _parse(data: Any, overrides: Mapping[str, Any]) -> Space:
    if not isinstance(data, Mapping):
        raise ConfigError("(top)", data, f"a mapping with keys {', '.join(KEYS)}")
    for key in data:
        if key not in KEYS:
            raise ConfigError(str(key), data[key], f"no such key; one of {', '.join(KEYS)}")
    parameters = parse_parameters({} if data.get("parameters") is None else data["parameters"])
    points = parse_points(section_of(data, "search").get("points"), parameters)
    raw, parameters = overridden(dict(data), parameters, overrides)
    for key, example in REQUIRED.items():
        if raw.get(key) is None:
            raise ConfigError(key, None, example)
    search = dict(section_of(raw, "search"))
    if "search.points" in overrides:
        points = parse_points(overrides["search.points"], parameters, "--set search.points")
    search.pop("points", None)
    verification = dict(section_of(raw, "verification"))
    samples = verification.pop("samples", "selection")
    fixed, left = fixed_parts(parameters)
    base: dict[str, Any] = {key: to_dict(parse(kind, section_of(raw, key), key)) for key, kind in RUN_SECTIONS.items()}
    for name, value in fixed.items():
        _put(base, name, value)
    levels = _levels(raw["levels"])
    space = Space(
        name=_name(raw["name"]),
        base=base,
        levels=levels,
        parameters=left,
        objectives=_given(raw, "objectives", objectives.DEFAULT_OBJECTIVES, objectives.parse_objectives, levels),
        constraints=_given(raw, "constraints", (), objectives.parse_constraints, levels),
        front=_given(raw, "front", dict(objectives.DEFAULT_FRONT), objectives.parse_front),
        search=_search(search),
        points=fitted_points(points, fixed, left),
        verification=_verification(verification),
        samples=_checked_samples(samples),
        resources=parse(ResourceSettings, section_of(raw, "resources"), "resources"),
        wandb=parse(WandbSettings, section_of(raw, "wandb"), "wandb"),
    )
    _check_together(space)
    return space


def _given(raw: Mapping[str, Any], key: str, default: Any, parser: Any, *arguments: Any) -> Any:
    return default if raw.get(key) is None else parser(raw[key], *arguments)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise ConfigError("name", value, "text of letters, digits, '.', '_' and '-': it names the folder of the run")
    return value


def _levels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError("levels", value, "a list of levels, for example [dense, int8]")
    return tuple(str(level) for level in parse_levels(value))


def _search(data: Mapping[str, Any]) -> SearchSettings:
    known = [field.name for field in fields(SearchSettings)]
    for key in data:
        if key not in known:
            raise ConfigError(f"search.{key}", data[key], f"no such key; one of {', '.join(known)}, points")
    return parse(SearchSettings, data, "search")


def _verification(data: Mapping[str, Any]) -> VerificationSettings:
    known = [name for name, _ in leaf_keys(VerificationSettings)]
    for key in data:
        if key not in known:
            raise ConfigError(f"verification.{key}", data[key], f"no such key; one of samples, {', '.join(known)}")
    return parse(VerificationSettings, data, "verification")


def _checked_samples(value: Any) -> str | int:
    if value == "selection" or (type(value) is int and value >= 1):
        return value  # type: ignore[no-any-return]
    raise ConfigError("verification.samples", value, _SAMPLES)


# --- what only shows when keys are seen together -------------------------------------------------------------------


def _check_together(space: Space) -> None:
    low, high = space.threat.domain
    if low < high < low + space.threat.epsilon:
        raise ConfigError("threat.epsilon", space.threat.epsilon, f"at most the width of the domain, {high - low:g}")
    _check_sparsities(space)
    _check_channels(space)
    check_sampler(space)
    first = {p.name: p.domain.ends()[0] for p in space.parameters}
    space.configuration(first, 1)  # what RunConfig checks over several keys


def _check_sparsities(space: Space) -> None:
    """No draw may have compression_set.low above .high. Undecidable under different conditions: then at the draw."""
    names = ("compression_set.low", "compression_set.high")
    by_name = {p.name: p for p in space.parameters}
    drawn = [by_name[n] for n in names if n in by_name]
    if not drawn or len({p.when for p in drawn}) > 1:
        return
    ends = []
    for name, default in zip(names, (CompressionSetConfig().low, CompressionSetConfig().high), strict=True):
        fixed = space.base.get("compression_set", {}).get(name.split(".")[1], default)
        ends.append(by_name[name].domain.ends() if name in by_name else (fixed,))
    if max(ends[0]) > min(ends[1]):
        name = drawn[0].name
        expected = f"low at most high in every draw; low goes up to {max(ends[0])} and high down to {min(ends[1])}"
        raise ConfigError(f"parameters.{name}", drawn[0].domain.to_dict(), expected)


def _check_channels(space: Space) -> None:
    """No draw may have compression_set.channels beside a family of channels, but for the same exception."""
    by_name = {p.name: p for p in space.parameters}
    drawn = [by_name[n] for n in ("compression_set.family", "compression_set.channels") if n in by_name]
    if not drawn or len({p.when for p in drawn}) > 1:
        return
    fixed = {"family": CompressionSetConfig().family, "channels": None} | space.base.get("compression_set", {})
    values = {p.name.split(".")[1]: p.domain.ends() for p in drawn}
    structured = [f for f in values.get("family", (fixed["family"],)) if f[1] == "s"]
    largest = max(values.get("channels", (fixed["channels"] or 0.0,)))
    if largest > 0.0 and structured:
        expected = "families of single weights (gu-..., lu-...) in every draw with compression_set.channels above 0; "
        raise ConfigError(f"parameters.{drawn[0].name}", drawn[0].domain.to_dict(), expected + f"got {structured[0]}")


def check_launch(space: Space, source: str) -> None:
    """What a new study must not begin with, although an earlier one may have been made with it and stays readable.

    Raises ConfigError, with the file's name ``source``.
    """
    try:
        _check_workers(space)
    except ConfigError as error:
        raise error.at(source) from None
    check_read(space, source)


def _check_workers(space: Space) -> None:
    """What training can do depends on who does it: batches are split over workers, bfloat16 is for GPUs."""
    workers = space.resources.workers
    for size, path in _possible(space, "train.batch_size"):
        if size % workers:
            raise ConfigError(path, size, f"a multiple of resources.workers = {workers}")
    for precision, path in _possible(space, "train.precision"):
        if precision not in (None, "float32") and space.resources.gpus_per_worker == 0:
            raise ConfigError(path, precision, "float32 without a GPU, where resources.gpus_per_worker is 0")


_STRATEGY = "compression_set.strategy"
_PRUNING = tuple(strategy for strategy in STRATEGIES if strategy != "none")
_READERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model.hidden": ("model.name", ("mlp",)),
    "train.momentum": ("train.optimizer", ("sgd",)),
    "compression_set.size": (_STRATEGY, ("random", "fixed")),
    **{f"compression_set.{k}": (_STRATEGY, _PRUNING) for k in ("low", "high", "family", "refresh_every", "channels")},
}
"""Keys that are read only with some values of another one."""
_OF_AWP = ("awp_unit", "awp_steps", "awp_member", "awp_kind")


def check_read(space: Space, source: str) -> None:
    """No parameter that nothing ever reads, on which a sampler would waste its trials; nor a perturbation whose radius
    was forgotten, for there would be none.

    Raises ConfigError, with the file's name ``source``.
    """
    drawn = [p.name for p in space.parameters]
    forgotten = [] if "awp_radius" in (*drawn, *space.base) else [name for name in _OF_AWP if name in space.base]
    for name in (*drawn, *forgotten):
        if name in _READERS:
            owner, values = _READERS[name]
            readers = f"{owner}: {' or '.join(map(str, values))}"
            read = any(value in values for value, _ in _possible(space, owner))
        elif name in _OF_AWP:
            readers = "awp_radius above 0"
            read = any(value > 0.0 for value, _ in _possible(space, "awp_radius"))
        elif name.startswith("model.") and space.base["model"].get("factory") is not None:
            readers, read = "model.name; model.factory has its own", False
        else:
            continue
        if not read:
            expected = f"no such parameter without {readers}: nothing would read it"
            raise ConfigError(f"parameters.{name}", name, expected, source)


def _possible(space: Space, name: str) -> list[tuple[Any, str]]:
    """The values that a key can have, of a range its ends, each with the place where it stands."""
    for parameter in space.parameters:
        if parameter.name == name:
            return [(value, f"parameters.{name}") for value in parameter.domain.ends()]
    value: Any = space.base
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    defaults = {_STRATEGY: CompressionSetConfig().strategy, "awp_radius": 0.0}
    return [(defaults.get(name) if value is None else value, name)]


# --- nested keys ---------------------------------------------------------------------------------------------------


def _put(nested: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        nested = nested.setdefault(group, {})
    nested[last] = list(value) if isinstance(value, tuple) else value


def _flat(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in nested.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat
