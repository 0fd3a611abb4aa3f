"""STAPS: TAPS over SABR's small box (Mao et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def staps(step: Step) -> Iterator[Tensor]:
    """Standard loss and the loss of STAPS; during the ramp of epsilon that of SABR."""
    loss, _ = full_loss(step, "staps")
    yield loss
