"""Which samplers there are, which spaces each can search, and the points of a grid. Knows nothing of Optuna."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cactus_ray.errors import ConfigError
from cactus_ray.search.domains import Choices, Range
from cactus_ray.search.parameters import Parameter

if TYPE_CHECKING:
    from cactus_ray.search.space import Space

MODEL_TRIALS = {"tpe": 2000, "gp": 200}
"""Trials that a sampler with a model is told at most: the newest and the non-dominated ones."""


def check_sampler(space: Space) -> None:
    """ConfigError, with the reason, where the sampler of the space cannot search it."""
    kind = space.search.sampler
    check = {"cmaes": _no_cmaes, "grid": _no_grid}.get(kind)
    if check is not None and (reason := check(space)):
        raise ConfigError("search.sampler", kind, f"another sampler, such as tpe: {reason}")


def _no_cmaes(space: Space) -> str | None:
    """CMA-ES adapts one covariance matrix of real numbers to one ranking."""
    for parameter in space.parameters:
        if isinstance(parameter.domain, Choices):
            return f"cmaes takes numbers, and {parameter.name} is a choice (fix it with --set {parameter.name}=VALUE)"
        if _conditional(space, parameter):
            return f"cmaes takes parameters that every trial has, and {parameter.name} is conditional"
    if len(space.parameters) < 2:
        return f"cmaes takes at least two parameters, and this space has {len(space.parameters)}"
    if len(space.objectives) > 1:
        return f"cmaes takes one objective, and this space has {', '.join(o.metric for o in space.objectives)}"
    if space.constraints:
        return f"cmaes knows no constraints, and this space has {space.constraints[0].name}"
    return None


def _conditional(space: Space, parameter: Parameter) -> bool:
    """Whether some draw goes without this parameter. Without choices in the space only the shared values decide."""
    return bool(parameter.when) or not space.is_active(parameter, {})


def _no_grid(space: Space) -> str | None:
    for parameter in space.parameters:
        if isinstance(parameter.domain, Range) and parameter.domain.q is None:
            return f"grid takes single values, and {parameter.name} is continuous (give it values, or a q)"
    return None


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Every configuration of a space without continuous ranges; the last parameter changes first."""

    def rest(place: int, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if place == len(space.parameters):
            yield values
            return
        parameter = space.parameters[place]
        if not space.is_active(parameter, values):
            yield from rest(place + 1, values)
            return
        for value in single_values(parameter.domain):
            yield from rest(place + 1, {**values, parameter.name: value})

    return rest(0, {})


def single_values(domain: Choices | Range) -> Iterator[Any]:
    """The values of a domain in order; without end in sight for a continuous one, which is a ValueError."""
    if isinstance(domain, Choices):
        return iter(domain.values)
    if domain.q is None:
        raise ValueError(f"{domain} is continuous")
    first, last = domain.multiples
    return (domain.value(k) for k in itertools.islice(itertools.count(first), last - first + 1))
