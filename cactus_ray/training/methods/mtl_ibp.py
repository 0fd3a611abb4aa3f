"""MTL-IBP (De Palma et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def mtl_ibp(step: Step) -> Iterator[Tensor]:
    """Standard loss, and adversarial and interval loss side by side."""
    loss, _ = full_loss(step, "mtl_ibp")
    yield loss
