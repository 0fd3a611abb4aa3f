"""What a sampler is told of a complete trial, of this study or of another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cactus_ray.search.objectives import feasible
from cactus_ray.search.space import Space


@dataclass(frozen=True, slots=True)
class PastTrial:
    """A completed trial of another study, in this space: active values, objectives in order, violations by name."""

    values: dict[str, Any]
    objectives: tuple[float, ...]
    violations: dict[str, float]


def told(space: Space, values: dict[str, Any], metrics: Mapping[str, float] | None) -> PastTrial | None:
    """What a sampler is told of a completed trial; None unless all that it needs is there and finite."""
    needed = [o.metric for o in space.objectives] + [c.metric for c in space.constraints]
    if metrics is None or not all(_is_finite(metrics.get(name)) for name in needed):
        return None
    return PastTrial(values, tuple(metrics[o.metric] for o in space.objectives), feasible(metrics, space.constraints))


def past_trial(row: Mapping[str, Any]) -> PastTrial:
    """A trial of a ``past`` event."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["parameters"].items()}
    return PastTrial(values, tuple(row["objectives"]), dict(row["violations"]))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
