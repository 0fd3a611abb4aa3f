"""Plain training, as a reference."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training import losses
from cactus_ray.training.step import Step


def standard(step: Step) -> Iterator[Tensor]:
    """The cross-entropy on clean images alone."""
    yield losses.standard(step.graph, step.params, step.images, step.labels, step.statistics)
