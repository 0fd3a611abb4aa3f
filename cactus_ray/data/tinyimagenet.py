"""Tiny ImageNet as its publisher ships it, unpacked: ``tiny-imagenet-200/{wnids.txt,train,val}``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cactus_ray.data.image_folder import read_images
from cactus_ray.data.splits import stratified
from cactus_ray.errors import ConfigError, UserError

FOLDER = "tiny-imagenet-200"
SIDE = 64
SELECTION_FRACTION = 0.05  # 25 of the 500 training images of each class


def tinyimagenet(root: str | None, image_size: int | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Tiny ImageNet [3, 64, 64] from ``root/tiny-imagenet-200`` or ``root`` itself; grey images become RGB.

    Classes are the names of ``wnids.txt``, sorted. 5 % of each training class are the selection split; the test split
    is the publisher's validation set (``val/val_annotations.txt``), because its test images have no labels. Tested on
    small archives of the same layout, untested on the original. Raises ConfigError for a root that holds no such
    folder, UserError that names what is missing or broken.
    """
    if image_size is not None:
        raise ConfigError("data.image_size", image_size, "nothing: the images of tinyimagenet have one size")
    folder = _folder(root)
    names = tuple(sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip()))
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"{folder / 'wnids.txt'}: {len(names)} lines; expected one class per line, each once")
    if split == "test":
        files, labels = _validation(folder / "val", names)
    else:
        files, labels = _training(folder / "train", names)
        selection, train = stratified(labels, (SELECTION_FRACTION,))
        chosen = train if split == "train" else selection
        files, labels = [files[i] for i in chosen], labels[chosen]
    if not files:
        raise UserError(f"{folder}: the {split} split is empty; expected the 100,000 training images of the publisher")
    return read_images(files, (SIDE, SIDE), all_alike=True), torch.from_numpy(labels), names


def _folder(root: str | None) -> Path:
    if root is not None:
        for folder in (Path(root) / FOLDER, Path(root)):
            if (folder / "wnids.txt").is_file():
                return folder
    raise ConfigError("data.root", root, f"the folder that holds {FOLDER}, unpacked, with wnids.txt in it")


def _training(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int64]]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted((folder / name / "images").glob("*.JPEG"))
        if not found:
            raise UserError(f"{folder / name / 'images'}: no *.JPEG; expected the training images of this class")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _validation(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int64]]:
    """Images and labels in the order of their names; each line is ``FILE<tab>CLASS<tab>box``."""
    path = folder / "val_annotations.txt"
    label_of = {name: label for label, name in enumerate(names)}
    found: dict[Path, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 2 or Path(parts[0]).name != parts[0] or parts[1] not in label_of:
            raise UserError(f"{path}:{number}: got {line[:80]!r}; expected FILE<tab>CLASS, a class of wnids.txt")
        found[folder / "images" / parts[0]] = label_of[parts[1]]
    files = sorted(found)
    return files, np.array([found[file] for file in files], dtype=np.int64)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected Tiny ImageNet's file of that name") from error
