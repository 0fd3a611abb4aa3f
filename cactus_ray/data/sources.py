"""Where images come from. A source is one function and one entry in ``SOURCES``.

Every source is called with (root, image_size, split) and gives (images float32 [N, C, H, W] in [0, 1], labels int64
[N], class names). It reads no file of a split that was not asked for, and raises UserError for what is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cactus_ray.data.cifar10 import cifar10
from cactus_ray.data.image_folder import image_folder
from cactus_ray.data.splits import hold_out, stratified
from cactus_ray.data.tinyimagenet import tinyimagenet
from cactus_ray.errors import ConfigError, UserError

Samples = tuple[Tensor, Tensor, tuple[str, ...]]
TEN_DIGITS = tuple(str(d) for d in range(10))
MNIST_SELECTION = 5_000


def digits(root: str | None, image_size: int | None, split: str) -> Samples:
    """The 1,797 digits of scikit-learn, [1, 8, 8]: 20 % test, 16 % selection, the rest train, class by class."""
    _fixed_size("digits", image_size)
    table = _digits_table()
    pictures, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    test, selection, train = stratified(labels, (0.2, 0.16))
    chosen = {"train": train, "selection": selection, "test": test}[split]
    images = torch.from_numpy(pictures[chosen]).float().div_(16)[:, None]
    return images, torch.from_numpy(labels[chosen]), TEN_DIGITS


def _digits_table() -> npt.NDArray[np.float64]:
    """64 grey values and the label of each digit, as scikit-learn has them in a file.

    Importing scikit-learn takes seconds, in every process that trains, and here only the file is wanted.
    """
    found = importlib.util.find_spec("sklearn")
    file = Path(str(found.origin if found else "")).with_name("datasets") / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def mnist(root: str | None, image_size: int | None, split: str) -> Samples:
    """MNIST from ``root/MNIST/raw``, [1, 28, 28]: 5,000 of the 60,000 training images are the selection split."""
    from torchvision import datasets

    _fixed_size("mnist", image_size)
    prefix = "t10k" if split == "test" else "train"
    wanted = f"the folder that holds MNIST/raw/{prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte"
    if root is None or not (Path(root) / "MNIST" / "raw").is_dir():
        raise ConfigError("data.root", root, wanted)
    try:
        source = datasets.MNIST(root, train=split != "test", download=False)
    # what torchvision raises for a file that is missing, cut off or not in its format
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(f"data.root: {root}: MNIST cannot be read ({error}); expected {wanted}") from error
    images, labels = source.data, source.targets
    if len(images) != len(labels):
        raise UserError(f"data.root: {root}: {len(labels)} labels for {len(images)} images; expected {wanted}")
    if split != "test":
        train, selection = hold_out(len(labels), MNIST_SELECTION)
        chosen = torch.from_numpy(train if split == "train" else selection)
        images, labels = images[chosen], labels[chosen]
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > 9:
        found = f"labels from {int(labels.min())} to {int(labels.max())}" if len(labels) else "no images"
        raise UserError(f"data.root: {root}: the {split} split has {found}; expected MNIST, {wanted}")
    return images[:, None].float().div_(255), labels.long(), TEN_DIGITS


def _fixed_size(name: str, image_size: int | None) -> None:
    if image_size is not None:
        raise ConfigError("data.image_size", image_size, f"nothing: the images of {name} have one size")


SOURCES: dict[str, Callable[[str | None, int | None, str], Samples]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "tinyimagenet": tinyimagenet,
    "image_folder": image_folder,
}
