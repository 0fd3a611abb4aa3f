"""Architectures, the user's own networks, batch-norm folding, and the file of a trained network."""

from cactus_ray.models.build import Untrained, build, checked, create, untrained
from cactus_ray.models.fold import fold_batch_norm
from cactus_ray.models.network import Network, load, pack, save, unpack
from cactus_ray.models.normalize import Normalize

__all__ = [
    "Network", "Normalize", "Untrained", "build", "checked", "create", "fold_batch_norm", "load", "pack", "save",
    "unpack", "untrained",
]  # fmt: skip
