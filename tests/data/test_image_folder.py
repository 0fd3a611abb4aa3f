"""Image folders of one's own: what is read, and what is refused by name."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cactus_ray.config import DataConfig
from cactus_ray.data import load, load_split
from cactus_ray.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 20 + 20 training and 3 + 3 test images of 6x8 pixels: cats dark and grey, dogs bright and RGB."""
    random = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 20), ("test", 3)):
        for name, low, shape in (("cat", 0, (6, 8)), ("dog", 128, (6, 8, 3))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(low, low + 128, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path


def config(root: Path, **options: int) -> DataConfig:
    return DataConfig(name="image_folder", root=str(root), **options)


def test_pixels_and_labels(root: Path) -> None:
    data = load(config(root))
    assert data.class_names == ("cat", "dog")
    assert data.input_shape == (3, 6, 8)
    assert {k: v.bincount().tolist() for k, v in data.labels.items()} == {
        "train": [18, 18],
        "selection": [2, 2],
        "test": [3, 3],
    }
    images, labels = data.split("test")
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    with Image.open(root / "test" / "dog" / "01.png") as image:
        assert torch.equal((images[4] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image)))
    assert torch.equal(images[labels == 0][:, 0], images[labels == 0][:, 2])  # grey became RGB
    train, selection = ({x.numpy().tobytes() for x in data.images[s]} for s in ("train", "selection"))
    assert not train & selection


def test_own_selection_folder(root: Path) -> None:
    (root / "test").rename(root / "selection")
    data = load(config(root), ("train", "selection"))
    assert data.labels["train"].bincount().tolist() == [20, 20]
    assert data.labels["selection"].bincount().tolist() == [3, 3]
    with pytest.raises(UserError, match="test: no such folder"):
        load(config(root), ("test",))


def test_resized_without_cropping(root: Path) -> None:
    Image.new("RGB", (30, 10), (255, 0, 0)).save(root / "test" / "cat" / "large.jpg")
    images, labels = load_split("image_folder", "test", str(root), image_size=5)
    assert images.shape == (7, 3, 5, 5)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert images[3].mean(dim=(1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_different_sizes_ask_for_image_size(root: Path) -> None:
    Image.new("L", (4, 4)).save(root / "train" / "dog" / "small.png")
    with pytest.raises(UserError, match=r"data\.image_size: got None; expected a side .*small\.png has 4x4.*8x6"):
        load(config(root), ("train",))


def test_hidden_copies_are_left_out(root: Path) -> None:
    before = load(config(root), ("train", "selection")).images
    for cat in sorted((root / "train" / "cat").iterdir()):
        kept = cat.parent / ".ipynb_checkpoints" / cat.name
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(cat.read_bytes())
    after = load(config(root), ("train", "selection")).images
    assert all(torch.equal(before[split], after[split]) for split in before)


def test_a_link_to_nowhere_is_named(root: Path) -> None:
    (root / "train" / "cat" / "lost.png").symlink_to(root / "nowhere.png")
    with pytest.raises(UserError, match=r"cat/lost\.png: broken image"):
        load(config(root), ("train",))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped"])
def test_broken_image_is_named(root: Path, damage: str) -> None:
    path = root / "train" / "dog" / "07.png"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "text": b"not an image",
            "empty": b"",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        }[damage]
    )
    with pytest.raises(UserError, match=r"dog/07\.png: broken image"):
        load(config(root), ("train",))


def test_test_images_are_not_opened_for_training(root: Path) -> None:
    (root / "test" / "dog" / "01.png").write_bytes(b"broken")
    assert set(load(config(root), ("train", "selection")).images) == {"train", "selection"}


def test_sixteen_bits_are_refused(root: Path) -> None:
    Image.fromarray(np.full((6, 8), 40_000, dtype=np.uint16)).save(root / "train" / "cat" / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: got pixels of mode I;16; expected 8 bits"):
        load(config(root), ("train",))


def test_other_files_are_left_out(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    assert load(config(root), ("train",)).labels["train"].bincount().tolist() == [18, 18]


def test_class_unknown_to_train(root: Path) -> None:
    (root / "test" / "cow").mkdir()
    with pytest.raises(UserError, match=r"test/cow: no such class in train; expected one of cat, dog"):
        load(config(root), ("test",))


def test_class_without_images(root: Path) -> None:
    (root / "train" / "ant").mkdir()
    with pytest.raises(UserError, match=r"train/ant: no images; expected files ending in \.png"):
        load(config(root), ("train",))


def test_one_class_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(UserError, match="got 1 class folders; expected one folder per class, at least 2"):
        load(config(tmp_path), ("train",))


def test_too_few_images_to_hold_out(root: Path) -> None:
    for name in ("cat", "dog"):
        for path in sorted((root / "train" / name).iterdir())[3:]:
            path.unlink()
    with pytest.raises(UserError, match="the selection split is empty"):
        load(config(root), ("selection",))


def test_real_photographs(test_data: Path, tmp_path: Path) -> None:
    """Some of the JPEG CIFAR-10, as its archive unpacks."""
    path = test_data / "cifar10_jpeg.tar.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    taken: Counter[str] = Counter()
    with tarfile.open(path) as archive:
        for member in archive:
            folder = str(Path(member.name).parent)
            if member.isfile() and taken[folder] < 12:
                taken[folder] += 1
                archive.extract(member, tmp_path, filter="data")
    data = load(config(tmp_path / "cifar10_jpeg"))
    assert data.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    assert data.input_shape == (3, 32, 32)
    assert {k: v.bincount().tolist() for k, v in data.labels.items()} == {
        "train": [11] * 10, "selection": [1] * 10, "test": [12] * 10,
    }  # fmt: skip
    images = data.images["train"]
    assert 0.3 < float(images.mean()) < 0.6
    assert 0.15 < float(images.std()) < 0.35
    smaller, _ = load_split("image_folder", "test", str(tmp_path / "cifar10_jpeg"), image_size=16)
    assert smaller.shape == (120, 3, 16, 16)
