"""IBP training with a short warm-up (Gowal et al. 2018; Shi et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def ibp(step: Step) -> Iterator[Tensor]:
    """Standard loss and the loss of interval bounds over the whole ball."""
    loss, _ = full_loss(step, "ibp")
    yield loss
