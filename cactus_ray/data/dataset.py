"""Loading a data set by its configuration: one cached read per process and split."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cactus_ray.config import DataConfig
from cactus_ray.data.sources import SOURCES
from cactus_ray.data.splits import subset
from cactus_ray.errors import ConfigError, UserError

SPLITS = ("train", "selection", "test")


@dataclass(frozen=True, slots=True)
class DataSet:
    """The splits that were asked for, by name. The tensors are shared by all callers: never write into them.

    ``images``: float32 [N, C, H, W] in [0, 1]; ``labels``: int64 [N] in [0, classes). ``digests``: SHA-256 (hex) of
    the split's images and then labels, as contiguous little-endian bytes.
    """

    name: str
    class_names: tuple[str, ...]
    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    digests: dict[str, str]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image."""
        return tuple(next(iter(self.images.values())).shape[1:])

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def refuse_outside(self, domain: tuple[float, float]) -> None:
        """Raise ConfigError where a pixel of a loaded split lies outside of ``domain``: nothing of it could be
        certified."""
        low = min(float(images.min()) for images in self.images.values())
        high = max(float(images.max()) for images in self.images.values())
        if low < domain[0] or high > domain[1]:
            held = f"an interval that holds the pixels of {self.name}, {low:g} to {high:g}"
            raise ConfigError("threat.domain", list(domain), held)

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Images and labels of a loaded split. Raises KeyError for a split that was not asked for."""
        if name not in self.images:
            raise KeyError(f"split {name!r} of {self.name} was not loaded, only {', '.join(self.images)}")
        return self.images[name], self.labels[name]


def load(config: DataConfig, splits: Sequence[str] = SPLITS) -> DataSet:
    """The asked splits of a data set; files of other splits are not read. Deterministic, cached per process.

    ``config.train_samples`` takes a fixed subset of the training split only. Raises UserError where the files are
    missing or broken, or a split is unknown.
    """
    if not splits:
        raise UserError(f"no split asked for; expected some of {', '.join(SPLITS)}")
    root = None if config.root is None else str(Path(config.root).expanduser())
    images: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    names: tuple[str, ...] = ()
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}")
        count = config.train_samples if split == "train" else None
        images[split], labels[split], digests[split], names = _split(config.name, root, config.image_size, split, count)
    return DataSet(config.name, names, images, labels, digests)


def load_split(name: str, split: str, root: str | None = None, image_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images float32 [N, C, H, W] in [0, 1] and labels int64 [N] of one whole split: where sample indices point.

    Raises UserError as ``load`` does, and for an unknown name.
    """
    if name not in SOURCES:
        raise UserError(f"data.name: got {name!r}; expected one of {', '.join(SOURCES)}")
    return load(DataConfig(name=name, root=root, image_size=image_size), (split,)).split(split)


def calibration(data: DataSet, count: int = 1000) -> tuple[Tensor, Tensor]:
    """The fixed training images on which statistics and gradient scores are measured: at most ``count`` of them."""
    images, labels = data.split("train")
    chosen = subset(len(labels), count)
    return images[chosen], labels[chosen]


@functools.lru_cache(maxsize=8)  # bounded: a study uses three splits of one data set
def _split(
    name: str, root: str | None, image_size: int | None, split: str, count: int | None
) -> tuple[Tensor, Tensor, str, tuple[str, ...]]:
    images, labels, names = SOURCES[name](root, image_size, split)
    if len(labels) == 0:  # a share of few images is none
        raise UserError(f"data.root: got {root!r}: the {split} split of {name} has no images; expected more images")
    if count is not None:
        chosen = subset(len(labels), count)
        images, labels = images[chosen], labels[chosen]
    return images, labels, _digest(images, labels), names


def _digest(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()
