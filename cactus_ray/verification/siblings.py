"""Levels of one network, verified together: what one level gives away is tried on the next.

Nothing is believed from one level to another: shared points are replayed on the level's own tensors, and every bound is
of these tensors. Points and what is worth trying first are shared, because that pays. Slopes as warm starts (2 % of the
time of alpha-CROWN), the order of splits (nothing) and stable neurons (what is stable is not bounded anyway) are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.hints import Hints
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings


@dataclass(frozen=True, slots=True)
class LevelModel:
    """The network that one level deploys: float32 tensors, on the device that does the work."""

    graph: Graph
    params: Params


def verify_levels(
    levels: Mapping[str, LevelModel],
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threat: ThreatConfig,
    settings: VerificationSettings,
    *,
    known: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict[str, list[SampleVerdict]]:
    """Verdicts on the same images at every level, by level, in the mapping's order, which is the order of the work.

    Arguments and guarantees of each level as of ``cascade.verify``, and its determinism. Counterexamples of earlier
    levels are tried first, after those of ``known``; the point that came nearest to one stands for the first attack on
    the next level; and what a level certified is bounded on the next one before it is attacked at length. What this
    leaves open goes through the same attacks and bounds as a level alone.
    """
    points = {index: list(some) for index, some in (known or {}).items()}
    hints: Hints = {}
    found: dict[str, list[SampleVerdict]] = {}
    for name, level in levels.items():
        found[name] = verify(
            level.graph, level.params, images, labels, indices, threat, settings, known=points, hints=hints
        )
        for verdict in found[name]:
            if verdict.counterexample is not None and verdict.decided_by not in ("clean", "known"):
                points.setdefault(verdict.index, []).append(torch.tensor(verdict.counterexample))
    return found
