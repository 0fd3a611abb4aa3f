"""Shorter arithmetic where it cannot hurt: in the attack, which only chooses where the loss looks."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from cactus_ray.config import TrainConfig
from cactus_ray.errors import ConfigError


def of_attack(train: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """What the attack's passes run in: with ``train.precision: bf16`` convolutions and matrix products in bfloat16.

    Batch norm and the loss stay in float32 also there; clean passes, bounds (their radii above all) and every loss that
    is trained on never come here.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")


def refuse_on_cpu(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for a shorter precision on a CPU, where it would be no faster."""
    if train.precision is not None and device.type == "cpu":
        raise ConfigError("train.precision", train.precision, "float32 without a GPU (resources.gpus_per_worker)")
