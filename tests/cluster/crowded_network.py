"""A network that does not fit a GPU beside too many others: as a lack of its memory looks to the training loop."""

import os
from pathlib import Path

import torch
from torch import nn


def crowded(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Runs out of memory in a process that has less of a GPU than CACTUS_TEST_GPUS; notes what it had."""
    if os.getpid() != int(os.environ["CACTUS_TEST_DRIVER"]):
        import ray

        had = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
        with Path(os.environ["CACTUS_TEST_NOTES"]).open("a") as notes:
            notes.write(f"{had:g} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        if had < float(os.environ["CACTUS_TEST_GPUS"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
