"""Values of a space as Optuna holds them: plain categories, and whole multiples for quantised ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cactus_ray.search.domains import Choices, Range
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.space import Space

INACTIVE = "(inactive)"


def drawn(trial: optuna.Trial, parameter: Parameter) -> Any:
    """Ask ``trial`` for a value of ``parameter``, as the configuration wants it."""
    domain, name = parameter.domain, parameter.name
    if isinstance(domain, Choices):
        return to_plain(domain, trial.suggest_categorical(name, [_label(v) for v in domain.values]))
    if domain.q is None:
        return trial.suggest_float(name, domain.low, domain.high, log=domain.log)
    # Optuna has no quantised logarithmic range; the multiples themselves are whole numbers, which it does draw.
    return domain.value(trial.suggest_int(name, *domain.multiples, log=domain.log))


def to_optuna(domain: Choices | Range, value: Any) -> Any:
    """A value of the domain as Optuna holds it."""
    if isinstance(domain, Choices):
        return _label(value)
    return value if domain.q is None else round(value / domain.q)


def to_plain(domain: Choices | Range, value: Any) -> Any:
    """Inverse of ``to_optuna``; what is no value of the domain comes back as it is."""
    if isinstance(domain, Choices):
        return next((v for v in domain.values if _label(v) == value), value)
    return domain.value(value) if domain.q is not None and isinstance(value, int) else value


def distribution(domain: Choices | Range) -> BaseDistribution:
    """The domain as Optuna writes it."""
    if isinstance(domain, Choices):
        return CategoricalDistribution([_label(v) for v in domain.values])
    if domain.q is None:
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    return IntDistribution(*domain.multiples, log=domain.log)


def encoded(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a trial as Optuna holds it. ValueError, with the reason, unless these are just the
    values that this space would ask for."""
    active: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for parameter in space.parameters:
        if space.is_active(parameter, active):
            value = values.get(parameter.name)
            plain = tuple(value) if isinstance(value, list) else value
            if not parameter.domain.contains(plain):
                raise ValueError(f"{parameter.name} = {value!r} is not in this one")
            active[parameter.name], found[parameter.name] = plain, to_optuna(parameter.domain, plain)
    if unasked := set(values) - set(active):
        raise ValueError(f"this one would not ask for {', '.join(sorted(unasked))}")
    return found


def distributions(space: Space, names: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The distributions of the named parameters."""
    return {p.name: distribution(p.domain) for p in space.parameters if p.name in names}


def with_inactive(domain: Choices | Range) -> BaseDistribution:
    """As ``distribution``, with a category of its own for a choice that is not active."""
    if isinstance(domain, Choices):
        return CategoricalDistribution([*(_label(v) for v in domain.values), INACTIVE])
    return distribution(domain)


def filled(parameter: Parameter, values: Mapping[str, Any]) -> Any:
    """The value of a parameter as Optuna holds it; an inactive one gets a place of its own or the middle."""
    domain = parameter.domain
    if parameter.name in values:
        return to_optuna(domain, values[parameter.name])
    if isinstance(domain, Choices):
        return INACTIVE
    low, high = (domain.low, domain.high) if domain.q is None else domain.multiples
    middle = math.sqrt(low * high) if domain.log else (low + high) / 2
    return middle if domain.q is None else round(middle)


def _label(value: Any) -> Any:
    """Optuna's categories are scalars; a list (hidden widths) is written as JSON."""
    return json.dumps(value) if isinstance(value, tuple) else value
