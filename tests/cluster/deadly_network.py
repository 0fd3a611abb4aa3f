"""A network whose making kills every process but the driver: a training process that the system ends."""

import os
import signal

from torch import nn


def deadly(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if os.getpid() != int(os.environ["CACTUS_TEST_DRIVER"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
