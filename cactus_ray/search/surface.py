"""A made-up study: learning curves from a formula, to try searchers and schedulers on more than was ever recorded."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cactus_ray.search.domains import Choices, Range
from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.rungs import extreme_levels, nominal_bits
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.simulate import Curve
from cactus_ray.search.space import Space

_DENSE_BYTES = 100_000
REFERENCE = {"certified_accuracy": 0.0, "standard_accuracy": 0.0, "bytes": 1.1 * _DENSE_BYTES}


def synthetic_curves(space: Space, trials: int, seed: int) -> list[Curve]:
    """``trials`` random configurations of a space with curves that rise, cross and fluctuate; see ``_curve``.

    Points have sizes and accuracies only, so ``space.front`` must be made of the columns of ``REFERENCE``. The same
    arguments give the same curves.
    """
    sampler = OptunaSampler(replace(space, search=replace(space.search, sampler="random", seed=seed)))
    asked = (sampler.ask() for _ in range(trials))
    return [_curve(space, suggestion.values, seed) for suggestion in asked if suggestion is not None]


def _curve(space: Space, values: Mapping[str, Any], seed: int) -> Curve:
    """Standard and certified accuracy pull apart; who is slow at first may end best, and endures compression.

    Each parameter, scaled to [0, 1], moves three latent qualities by smooth functions with directions drawn once per
    seed: skill, robustness and speed of learning.
    """
    skill, robustness, pace = (_quality(space, values, f"{seed}/{name}") for name in ("skill", "robust", "pace"))
    noise = random.Random(f"{seed}/{sorted(values.items())}")
    epochs = int(values.get("train.epochs", space.base["train"]["epochs"]))
    finals = {level: _final(level, skill, robustness) for level in space.levels}
    metrics = []
    for epoch in range(1, epochs + 1):
        learned = 1.0 - math.exp(-(1.5 + 4.0 * pace) * epoch / epochs)
        metrics.append(
            {
                f"{name}@{level}": min(max(final * learned + noise.gauss(0.0, 0.01), 0.0), 1.0)
                for level in extreme_levels(space.levels)
                for name, final in zip(("standard_accuracy", "ibp_certified_accuracy"), finals[level], strict=True)
            }
        )
    seconds = 1.0 + 2.0 * robustness
    points = [_point(level, *finals[level], seconds * epochs) for level in space.levels]
    outcome = trial_metrics(points, seconds * epochs, space.front, REFERENCE)
    return Curve(values, (seconds,) * epochs, tuple(metrics), 0.2 * epochs, tuple(points), outcome, seconds / 2.0)


def _final(level: str, skill: float, robustness: float) -> tuple[float, float]:
    """Standard and certified accuracy at the end; compression costs more where robustness is low."""
    lost = (1.0 - nominal_bits(level) / 32.0) ** 8 * (1.0 - 0.7 * robustness) * 0.8
    standard = (0.6 + 0.4 * skill - 0.1 * robustness) * (1.0 - lost)
    return standard, standard * (0.2 + 0.7 * robustness * (0.5 + 0.5 * skill))


def _point(level: str, standard: float, certified: float, seconds: float) -> dict[str, Any]:
    samples = 1000
    sure = round(certified * samples)
    return {
        "level": level, "samples": samples, "standard_accuracy": round(standard * samples) / samples,
        "n_certified": sure, "n_falsified": samples - sure, "n_unknown": 0, "certified_accuracy": sure / samples,
        "bytes": round(_DENSE_BYTES * nominal_bits(level) / 32), "macs": 0, "train_seconds": seconds,
    }  # fmt: skip


def _quality(space: Space, values: Mapping[str, Any], purpose: str) -> float:
    """In [0, 1]: the mean over parameters of a bump around a place of its own."""
    found = [
        1.0 - min(abs(_place(p.domain, values[p.name]) - _fraction(f"{purpose}/{p.name}")) * 1.5, 1.0) ** 2
        for p in space.parameters
        if p.name in values
    ]
    return sum(found) / len(found) if found else 0.5


def _place(domain: Choices | Range, value: Any) -> float:
    if isinstance(domain, Choices):
        return domain.values.index(value) / max(len(domain.values) - 1, 1)
    return domain.share(value)


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
