"""CROWN-IBP with loss fusion (Zhang et al. 2020; Xu et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cactus_ray.training.step import Step, full_loss


def crown_ibp(step: Step) -> Iterator[Tensor]:
    """Standard loss and the fused loss of linear and interval bounds."""
    loss, _ = full_loss(step, "crown_ibp")
    yield loss
