"""Training methods: one file per published method, one entry in ``METHODS``.

A method gives the losses of one step one after the other; their sum is the step's loss. The loop takes the gradient of
each before it asks for the next, so that only one member's activations are alive, and a method can use the gradient of
what it gave before (``Step.gradients``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from cactus_ray.training.methods.cactus import cactus
from cactus_ray.training.methods.ibp import ibp
from cactus_ray.training.methods.sabr import sabr
from cactus_ray.training.step import Step

Method = Callable[[Step], Iterator[Tensor]]

METHODS: dict[str, Method] = {"cactus": cactus, "sabr": sabr, "ibp": ibp}
