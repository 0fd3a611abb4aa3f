"""A network for ``model.factory`` that runs out of GPU memory beside another trial, on a Ray without a real GPU."""

from __future__ import annotations

import ray
import torch
from torch import nn


def crowded(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A linear classifier of 8x8 images. In a Ray process with less than half a GPU, raises torch.OutOfMemoryError."""
    if ray.is_initialized():
        had = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
        if had < 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
