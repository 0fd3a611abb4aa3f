"""Random crops and flips of training images, on the device where they are. Images that are scored or certified never
pass through here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.config import TrainConfig


def draw(train: TrainConfig, count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers [count, 3] for ``augment`` on the generator's device; [0, 3] where nothing is augmented."""
    active = train.crop_padding is not None or train.flip is not None
    return torch.rand(count if active else 0, 3, generator=generator, device=generator.device)


def augment(images: Tensor, draws: Tensor, train: TrainConfig) -> Tensor:
    """Images [N, C, H, W] moved by up to ``train.crop_padding`` pixels and, half of them, mirrored left to right.

    ``draws`` [N, 3] in [0, 1): down, right, mirrored; without any, the images come back. A crop of the same size out of
    the image padded with zeros (black) on all sides, every place equally likely. Values stay what they are, so they
    stay inside the domain if 0 does. No host synchronisation.
    """
    if len(draws) == 0:
        return images
    padding = train.crop_padding or 0
    height, width = images.shape[2:]
    offsets = (draws[:, :2] * (2 * padding + 1)).long().clamp(max=2 * padding)  # a draw just below 1 may round up
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    if train.flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    columns = columns + offsets[:, 1:2]
    padded = F.pad(images, (padding,) * 4)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
