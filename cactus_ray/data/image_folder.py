"""The user's own images: ``root/{train,test}/CLASS/*.png`` (or jpg, ...), and ``root/selection`` where there is one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cactus_ray.data.splits import stratified
from cactus_ray.errors import ConfigError, UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
SELECTION_FRACTION = 0.1
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def image_folder(root: str | None, image_size: int | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """A folder of images as RGB [3, H, W], files in the order of their names.

    Classes are the folders in ``root/train``, sorted. Without ``root/selection``, 10 % of each training class are the
    selection split. ``image_size`` resizes to a square (antialiased bilinear, not cropped); without it all images must
    be as large as the first one. Files and folders whose names begin with a dot are left out. Pixels are taken as they
    are stored, as torchvision's ImageFolder takes them: EXIF orientation is not applied, and transparency is dropped.
    Raises UserError that names a broken image, a folder that is missing or empty.
    """
    if root is None or not (Path(root) / "train").is_dir():
        raise ConfigError("data.root", root, "a folder that holds train/CLASS/*.png and test/CLASS/*.png")
    folder = Path(root)
    names = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        raise UserError(
            f"{folder / 'train'}: got {len(names)} class folders; expected one folder per class, at least 2"
        )
    files, labels = _listing(folder / "train", names)
    size = (image_size, image_size) if image_size is not None else _size(files[0])
    held_out = not (folder / "selection").is_dir()
    if split == "test" or (split == "selection" and not held_out):
        files, labels = _listing(folder / split, names)
    elif held_out:
        selection, train = stratified(labels, (SELECTION_FRACTION,))
        chosen = train if split == "train" else selection
        files, labels = [files[i] for i in chosen], labels[chosen]
    if not files:
        share = f"selection: {SELECTION_FRACTION:.0%} of each class"
        raise UserError(f"{folder}: the {split} split is empty; expected more images ({share})")
    return read_images(files, size, resize=image_size is not None), torch.from_numpy(labels), names


def _listing(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], NDArray[np.int64]]:
    """Image files below the class folders, sorted, with their labels; files of other types are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected {folder.name}/CLASS/*.png")
    found = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if unknown := sorted(found - set(names)):
        raise UserError(f"{folder / unknown[0]}: no such class in train; expected one of {', '.join(names[:20])}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        paths = sorted(p for p in (folder / name).rglob("*") if _is_image(p, folder / name))
        if not paths and folder.name == "train":  # the other splits may lack a class
            raise UserError(f"{folder / name}: no images; expected files ending in {', '.join(EXTENSIONS)}")
        files += paths
        labels += [label] * len(paths)
    return files, np.array(labels, dtype=np.int64)


def _is_image(path: Path, folder: Path) -> bool:
    # copies that tools keep in hidden folders (.ipynb_checkpoints) would stand on both sides of a split
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    lost = path.is_symlink() and not path.exists()  # refused as broken when it is read
    return path.suffix.lower() in EXTENSIONS and not hidden and (lost or path.is_file())


def _size(path: Path) -> tuple[int, int]:
    """(width, height) from the header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            return width, height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _broken(path, error) from error


def read_images(files: list[Path], size: tuple[int, int], *, resize: bool = False, all_alike: bool = False) -> Tensor:
    """float32 [N, 3, H, W] in [0, 1] of image files; ``size`` is (width, height).

    One byte per value until the very end, so that at most 5 bytes are held per value. Raises UserError that names a
    broken image, and one of another size unless ``resize``; ``all_alike``: its publisher made all of this size.
    """
    pixels = np.empty((len(files), 3, size[1], size[0]), dtype=np.uint8)
    for row, path in zip(pixels, files, strict=True):
        row[:] = _decode(path, size, resize=resize, all_alike=all_alike).transpose(2, 0, 1)
    return torch.from_numpy(pixels).float().div_(255)


def _decode(path: Path, size: tuple[int, int], *, resize: bool, all_alike: bool) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BIT:  # PIL would clip, not scale, what has more than 8 bits
                raise UserError(f"{path}: got pixels of mode {image.mode}; expected 8 bits per channel, grey or RGB")
            rgb = image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")
    # what PIL's decoders raise for damaged files
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        zlib.error,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise _broken(path, error) from error
    if rgb.size != size:
        if all_alike:
            found = f"{rgb.size[0]}x{rgb.size[1]}"
            raise UserError(f"{path}: got {found} pixels; expected {size[0]}x{size[1]}, as published")
        if not resize:
            wanted = f"a side in pixels, for {path} has {rgb.size[0]}x{rgb.size[1]} and others {size[0]}x{size[1]}"
            raise ConfigError("data.image_size", None, wanted)
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: broken image ({error}); expected a readable image, replace or remove it")
