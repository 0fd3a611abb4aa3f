"""CC-IBP (De Palma et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def cc_ibp(step: Step) -> Iterator[Tensor]:
    """Standard loss, and the loss of a convex combination of adversarial and interval margins."""
    loss, _ = full_loss(step, "cc_ibp")
    yield loss
