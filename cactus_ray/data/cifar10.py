"""CIFAR-10 as its publisher ships it: the "python version" or the "binary version", unpacked, read without torchvision.

Nothing is unpickled that could run code: the pickles of the python version may build lists, dicts, numbers, bytes and
one kind of array, which is made here from its bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cactus_ray.data.splits import hold_out
from cactus_ray.errors import ConfigError, UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SELECTION_FRACTION = 0.1  # 5,000 of the 50,000 training images
_PIXELS = 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]


def cifar10(root: str | None, image_size: int | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """CIFAR-10 [3, 32, 32] from ``root/cifar-10-batches-py`` or ``root/cifar-10-batches-bin``, or ``root`` itself.

    10 % of the training images, fixed at random, are the selection split. Tested on small archives of the same layout,
    untested on the original. Raises ConfigError for a root that holds neither, UserError that names a file which is
    missing, damaged, or a pickle of anything but rows of pixels and labels.
    """
    if image_size is not None:
        raise ConfigError("data.image_size", image_size, "nothing: the images of cifar10 have one size")
    folder, suffix, read = _version(root)
    names = ("test_batch",) if split == "test" else _TRAIN
    parts = [read(folder / f"{name}{suffix}") for name in names]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    if split != "test":
        train, selection = hold_out(len(labels), round(SELECTION_FRACTION * len(labels)))
        chosen = train if split == "train" else selection
        pixels, labels = pixels[chosen], labels[chosen]
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32)).float().div_(255)
    return images, torch.from_numpy(labels), CLASSES


def _version(root: str | None) -> tuple[Path, str, Callable[[Path], _Rows]]:
    """The folder of the batches, the end of their names, and what reads them."""
    versions = (("cifar-10-batches-py", "", _read_pickle), ("cifar-10-batches-bin", ".bin", _read_binary))
    if root is not None:
        for name, suffix, read in versions:
            for folder in (Path(root) / name, Path(root)):
                if (folder / f"test_batch{suffix}").is_file() or (folder / f"data_batch_1{suffix}").is_file():
                    return folder, suffix, read
    raise ConfigError("data.root", root, f"the folder that holds {versions[0][0]} or {versions[1][0]}, unpacked")


def _read_binary(path: Path) -> _Rows:
    """Records of one byte label and 3,072 bytes of pixels, channel by channel."""
    data = np.frombuffer(_content(path), dtype=np.uint8)
    if data.size == 0 or data.size % (1 + _PIXELS):
        raise UserError(f"{path}: {data.size} bytes; expected a multiple of {1 + _PIXELS} (a label and its pixels)")
    rows = data.reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], _labels(path, rows[:, 0].astype(np.int64))


def _read_pickle(path: Path) -> _Rows:
    content = _content(path)
    try:
        batch = _Restricted(content).load()
        rows, labels = batch[b"data"], batch[b"labels"]
        if not isinstance(rows, _Array) or not isinstance(labels, list):
            raise UserError(f"{path}: 'data' and 'labels' are not an array and a list; expected a batch of CIFAR-10")
        pixels = rows.values()
        return pixels, _labels(path, np.array(labels, dtype=np.int64), len(pixels))
    except _BROKEN_PICKLE as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: not a batch of CIFAR-10's python version ({what}); unpack the archive anew"
        ) from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected CIFAR-10's file of that name") from error


def _labels(path: Path, labels: NDArray[np.int64], rows: int | None = None) -> NDArray[np.int64]:
    if rows is not None and labels.shape != (rows,):
        raise UserError(f"{path}: {labels.size} labels for {rows} images; expected one each")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise UserError(f"{path}: labels are not in 0 to {len(CLASSES) - 1}; expected CIFAR-10, not another data set")
    return labels


# --- pickles without code --------------------------------------------------------------------------------------------

_BROKEN_PICKLE = (
    pickle.UnpicklingError, EOFError, LookupError, struct.error, ValueError, TypeError, AttributeError, ArithmeticError,
    AssertionError, RecursionError, MemoryError,
)  # fmt: skip
"""What reading a damaged one raises."""


class _Array:
    """Stands for numpy's array while a pickle is read: takes what the pickle says of it, and runs nothing."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def values(self) -> NDArray[np.uint8]:
        """uint8 [N, 3072]. Raises ValueError for any other array."""
        _, shape, kind, fortran, raw = self.state
        plain = isinstance(kind, _Kind) and kind.name in ("u1", b"u1") and isinstance(raw, bytes)
        if not plain or fortran or len(shape) != 2 or shape[1] != _PIXELS:
            raise ValueError(f"an array of shape {shape}; expected bytes [N, {_PIXELS}]")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _Kind:
    """Stands for numpy's dtype."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: one byte has none."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Restricted(pickle._Unpickler):  # the one in Python: the one in C reserves as much memory as a pickle asks for
    """Knows the five names that a batch needs, none of which is looked up in a module."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _KNOWN[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs") from None
