"""TAPS: interval bounds, then an attack (Mao et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def taps(step: Step) -> Iterator[Tensor]:
    """Standard loss and the loss of TAPS; during the ramp of epsilon that of intervals."""
    loss, _ = full_loss(step, "taps")
    yield loss
