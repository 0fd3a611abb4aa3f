"""Input normalisation as a layer, so that epsilon and the domain stay in pixel units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """``y = x * scale + shift`` per channel with fixed tensors [C]; for a mean and deviation see ``standard``."""

    is_scale_shift = True
    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @classmethod
    def standard(cls, mean: Sequence[float], deviation: Sequence[float]) -> Normalize:
        """``(x - mean) / deviation`` per channel; deviations > 0."""
        wide = torch.tensor(deviation, dtype=torch.float64)
        shift = -torch.tensor(mean, dtype=torch.float64) / wide
        return cls((1 / wide).float(), shift.float())

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, ...] to the same shape."""
        shape = (1, -1, *([1] * (x.dim() - 2)))
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))
