"""Adversarial training (Madry et al. 2018), as a reference."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def pgd(step: Step) -> Iterator[Tensor]:
    """Standard loss and the loss at adversarial points."""
    loss, _ = full_loss(step, "pgd")
    yield loss
