"""Tiny ImageNet in the publisher's layout, on a small archive."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cactus_ray.config import DataConfig
from cactus_ray.data import load, load_split
from cactus_ray.errors import UserError

CLASSES = ("n02124075", "n01443537", "n04067472")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, 20 training images each (one of them grey), 6 validation images."""
    random = np.random.Generator(np.random.PCG64(0))
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(CLASSES) + "\n")
    for value, name in enumerate(CLASSES):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        (images.parent / f"{name}_boxes.txt").write_text("")
        for i in range(20):
            pixels = random.integers(60 * value, 60 * value + 60, (64, 64) if i == 3 else (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{name}_{i}.JPEG")
    lines = []
    for i in range(6):
        color = (60 * (i % 3) + 30,) * 3
        Image.new("RGB", (64, 64), color).save(folder / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return tmp_path


def test_splits_and_labels(root: Path) -> None:
    data = load(DataConfig(name="tinyimagenet", root=str(root)))
    assert data.class_names == tuple(sorted(CLASSES))
    assert data.input_shape == (3, 64, 64)
    assert {k: v.bincount().tolist() for k, v in data.labels.items()} == {
        "train": [19] * 3, "selection": [1] * 3, "test": [2] * 3,
    }  # fmt: skip
    images, labels = data.split("test")
    brightness = [CLASSES.index(data.class_names[label]) * 60 + 30 for label in labels.tolist()]
    assert (images.mean(dim=(1, 2, 3)) * 255).tolist() == pytest.approx(brightness, abs=2)
    train, labels = data.split("train")
    for image, label in zip(train, labels.tolist(), strict=True):
        assert abs(float(image.mean()) * 255 - CLASSES.index(data.class_names[label]) * 60 - 30) < 8
    inside = load(DataConfig(name="tinyimagenet", root=str(root / "tiny-imagenet-200")))
    assert inside.digests == data.digests


def _damage(folder: Path, what: str) -> None:
    annotations = folder / "val" / "val_annotations.txt"
    image = folder / "val" / "images" / "val_3.JPEG"
    match what:
        case "no annotations":
            annotations.unlink()
        case "unknown class":
            annotations.write_text(annotations.read_text() + "val_0.JPEG\tn999\t0\t0\t1\t1\n")
        case "another folder":
            annotations.write_text("../../train/x.JPEG\tn02124075\n")
        case "no tab":
            annotations.write_text("val_0.JPEG n02124075\n")
        case "broken image":
            image.write_bytes(image.read_bytes()[:200])
        case "missing image":
            image.unlink()
        case "other size":
            Image.new("RGB", (32, 32)).save(image)
        case "no classes":
            (folder / "wnids.txt").write_text("\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no annotations", r"val_annotations\.txt: cannot be read"),
        ("unknown class", r"val_annotations\.txt:7: got 'val_0\.JPEG.*n999"),
        ("another folder", r"val_annotations\.txt:1: got '\.\./\.\./train"),
        ("no tab", r"val_annotations\.txt:1: got 'val_0.JPEG n02124075'; expected FILE<tab>CLASS"),
        ("broken image", r"val_3\.JPEG: broken image"),
        ("missing image", r"val_3\.JPEG: broken image"),
        ("other size", r"val_3\.JPEG: got 32x32 pixels; expected 64x64"),
        ("no classes", r"wnids\.txt: 0 lines; expected one class per line"),
    ],
)
def test_what_is_wrong_is_named(what: str, message: str, root: Path) -> None:
    _damage(root / "tiny-imagenet-200", what)
    with pytest.raises(UserError, match=message):
        load_split("tinyimagenet", "test", str(root))


def test_a_class_without_images(root: Path) -> None:
    for path in (root / "tiny-imagenet-200" / "train" / CLASSES[1] / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"{CLASSES[1]}/images: no \*\.JPEG"):
        load_split("tinyimagenet", "train", str(root))


def test_missing_root(tmp_path: Path) -> None:
    for place in (None, str(tmp_path)):
        with pytest.raises(UserError, match=r"data\.root: got .*tiny-imagenet-200, unpacked"):
            load_split("tinyimagenet", "test", place)
    with pytest.raises(UserError, match=r"data\.image_size: got 56; expected nothing"):
        load_split("tinyimagenet", "test", str(tmp_path), image_size=56)
