"""SABR: small adversarial bounding regions (Mueller et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def sabr(step: Step) -> Iterator[Tensor]:
    """Standard loss and the loss of interval bounds over a small box around an adversarial point."""
    loss, _ = full_loss(step, "sabr")
    yield loss
