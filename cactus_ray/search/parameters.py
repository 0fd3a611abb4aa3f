"""The searched parameters of a space: which there are, and when each is active.

A parameter is named like the key of ``RunConfig`` that it sets (``learning_rate``, ``compression_set.high``). An
inactive one is absent from the configuration and its hash: because its ``when:`` does not hold, or because the method
that was drawn does not read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cactus_ray.config import CERTIFIED_LOSSES, METHODS, options_of
from cactus_ray.errors import ConfigError
from cactus_ray.options import LOSS_KEYS
from cactus_ray.options import METHOD_KEYS as METHOD_KEYS
from cactus_ray.search.domains import Choices, Key, Range, parse_domain, run_keys

LEAF_KEYS = ("value", "values", "min", "max", "distribution", "q", "when")
FIXED_SECTIONS = ("data", "threat")  # one study compares networks on the same images under the same threat


@dataclass(frozen=True, slots=True)
class Parameter:
    """One searched key. ``when``: it is active only while each named parameter is active with one of the values."""

    name: str
    domain: Choices | Range
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The parameter in the grammar of the file."""
        conditions = {name: Choices(values).to_dict()["values"] for name, values in self.when}
        return self.domain.to_dict() | ({"when": conditions} if conditions else {})


# --- from plain data -----------------------------------------------------------------------------------------------


def parse_parameters(data: Any, path: str = "parameters") -> tuple[Parameter, ...]:
    """The parameters in an order in which every condition is decided before it is asked for.

    Raises ConfigError for whatever could not be drawn: an unknown name, a value that the key does not take, an empty
    range, a condition that names no parameter, can never hold or leads back to itself.
    """
    found: dict[str, tuple[Parameter, str]] = {}
    for name, spec, when, here in _leaves(data, path, "", {}):
        if name in found:
            raise ConfigError(here, name, f"each parameter once; it already stands at {found[name][1]}")
        found[name] = Parameter(name, parse_domain(spec, here, _key(name, here)), tuple(when.items())), here
    places = {name: place for name, (_, place) in found.items()}
    parameters = {name: _checked_condition(p, found, places[name]) for name, (p, _) in found.items()}
    ordered = _ordered(parameters, places)
    for parameter in ordered:
        check_used(parameter, parameters, places[parameter.name])
    return ordered


def _leaves(
    data: Any, path: str, prefix: str, when: Mapping[str, tuple[Any, ...]]
) -> Iterable[tuple[str, Mapping[str, Any], dict[str, tuple[Any, ...]], str]]:
    if not isinstance(data, Mapping):
        raise ConfigError(path, data, "a mapping of parameters, for example learning_rate: {min: 0.001, max: 0.01}")
    for key, spec in data.items():
        here = f"{path}.{key}"
        if not isinstance(key, str):
            raise ConfigError(here, key, "the name of a parameter as text")
        if not isinstance(spec, Mapping):
            raise ConfigError(here, spec, f"a mapping such as {{value: {spec}}}, {{values: [...]}} or {{min: , max: }}")
        inner = _merged(when, spec.get("when", {}), f"{here}.when")
        allowed = ("when", "parameters") if "parameters" in spec else LEAF_KEYS
        for unknown in (k for k in spec if k not in allowed):
            raise ConfigError(f"{here}.{unknown}", spec[unknown], f"no such key; one of {', '.join(allowed)}")
        if "parameters" in spec:
            yield from _leaves(spec["parameters"], f"{here}.parameters", f"{prefix}{key}.", inner)
        else:
            yield prefix + key, spec, inner, here


def _merged(outer: Mapping[str, tuple[Any, ...]], data: Any, path: str) -> dict[str, tuple[Any, ...]]:
    """Conditions of a group and of what stands inside it: both must hold."""
    if not isinstance(data, Mapping):
        raise ConfigError(path, data, "a mapping such as {method: [cactus]}")
    merged = dict(outer)
    for name, values in data.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}.{name}", values, "a list of at least one value, for example [cactus]")
        plain = [tuple(v) if isinstance(v, list) else v for v in values]
        merged[name] = tuple(v for v in plain if name not in outer or v in outer[name])
        if not merged[name]:
            raise ConfigError(f"{path}.{name}", values, f"a value that the outer condition {list(outer[name])} allows")
    return merged


def _key(name: str, path: str) -> Key:
    if name.split(".")[0] in FIXED_SECTIONS:
        section = name.split(".")[0]
        raise ConfigError(path, name, f"{section} fixed in its section: the points of a front share one {section}")
    if name not in run_keys():
        names = ", ".join(k for k in run_keys() if k.split(".")[0] not in FIXED_SECTIONS)
        raise ConfigError(path, name, f"no such parameter; one of {names}")
    return run_keys()[name]


# --- conditions ----------------------------------------------------------------------------------------------------


def _checked_condition(parameter: Parameter, found: Mapping[str, tuple[Parameter, str]], path: str) -> Parameter:
    when = []
    for name, values in parameter.when:
        here = f"{path}.when.{name}"
        if name not in found:
            raise ConfigError(here, name, f"the name of another parameter of this space: {', '.join(found)}")
        domain = found[name][0].domain
        if isinstance(domain, Range) and domain.q is None:
            raise ConfigError(here, list(values), f"a parameter with single values; {name} is continuous")
        converted = [run_keys()[name].convert(value, here) for value in values]
        for value in (v for v in converted if not domain.contains(v)):
            raise ConfigError(here, value, f"a value that {name} can take: {shown(domain)}")
        when.append((name, tuple(converted)))
    return replace(parameter, when=tuple(when))


def shown(domain: Choices | Range) -> str:
    """A domain in words."""
    return ", ".join(map(str, domain.values)) if isinstance(domain, Choices) else f"{domain.low} to {domain.high}"


def _parents(parameter: Parameter, names: Iterable[str]) -> list[str]:
    """What must be drawn first: the conditions, and the method for keys that only some methods read."""
    parents = [name for name, _ in parameter.when]
    key = parameter.name.split(".")[0]
    if key in METHOD_KEYS:
        parents.append("method")
        if key in LOSS_KEYS:
            parents.append("certified_loss")
    return [name for name in parents if name in names]


def _ordered(parameters: Mapping[str, Parameter], places: Mapping[str, str]) -> tuple[Parameter, ...]:
    done: dict[str, Parameter] = {}

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            circle = " -> ".join((*chain[chain.index(name) :], name))
            raise ConfigError(f"{places[name]}.when", circle, "conditions that do not lead back to the same parameter")
        if name not in done:
            for parent in _parents(parameters[name], parameters):
                visit(parent, (*chain, name))
            done[name] = parameters[name]

    for name in parameters:
        visit(name, ())
    return tuple(done.values())


def uses(name: str, method: str, certified_loss: str | None) -> bool:
    """Whether a run of this method reads the key ``name``."""
    key = name.split(".")[0]
    return key not in METHOD_KEYS or key in options_of(method, certified_loss)


def ever_used(parameter: Parameter, parameters: Mapping[str, Parameter]) -> bool:
    """Whether any method and certified loss that can be drawn reads this parameter."""

    def possible(name: str, default: str) -> tuple[str, ...]:
        other = parameters.get(name)
        values = other.domain.ends() if other else (default,)
        allowed = dict(parameter.when).get(name, values)
        return tuple(v for v in values if v in allowed) + ((default,) if other and other.when else ())

    losses = possible("certified_loss", "sabr")
    return any(uses(parameter.name, m, loss) for m in possible("method", "cactus") for loss in losses)


def check_used(parameter: Parameter, parameters: Mapping[str, Parameter], path: str) -> None:
    """Raise ConfigError at ``path`` for a parameter that no method and certified loss that can be drawn reads."""
    if not ever_used(parameter, parameters):
        readers = [m for m in METHODS if any(uses(parameter.name, m, loss) for loss in CERTIFIED_LOSSES)]
        raise ConfigError(path, parameter.name, f"a parameter that a possible method reads; {', '.join(readers)} would")


def is_active(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Whether ``parameter`` takes part, given the active values drawn (or fixed) so far."""
    if not all(name in values and values[name] in allowed for name, allowed in parameter.when):
        return False
    return uses(parameter.name, values.get("method", "cactus"), values.get("certified_loss"))


def fixed_parts(parameters: Sequence[Parameter]) -> tuple[dict[str, Any], tuple[Parameter, ...]]:
    """Split off what is decided: unconditional parameters with one value, and those that can never be active.

    ``parameters`` are in order (conditions first). Returns the fixed values and the parameters that are left, their
    conditions on fixed values removed.
    """
    by_name = {p.name: p for p in parameters}
    fixed: dict[str, Any] = {}
    left: dict[str, Parameter] = {}
    for parameter in parameters:
        when = tuple(
            (name, tuple(v for v in allowed if by_name[name].domain.contains(v)))
            for name, allowed in parameter.when
            if name in fixed or name in left
        )
        possible = len(when) == len(parameter.when) and all(allowed for _, allowed in when)
        if not possible or not ever_used(parameter, by_name):
            continue
        when = tuple((name, allowed) for name, allowed in when if name not in fixed)
        if not when and isinstance(parameter.domain, Choices) and len(parameter.domain.values) == 1:
            fixed[parameter.name] = parameter.domain.values[0]
        else:
            left[parameter.name] = replace(parameter, when=when)
    return fixed, tuple(left.values())
