"""Exp-IBP (De Palma et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def exp_ibp(step: Step) -> Iterator[Tensor]:
    """Standard loss, and the geometric mean of adversarial and interval loss."""
    loss, _ = full_loss(step, "exp_ibp")
    yield loss
