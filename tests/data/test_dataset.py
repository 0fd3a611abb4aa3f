"""Digits and MNIST: real content, disjoint splits, pinned digests, clear refusals."""

import dataclasses
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from cactus_ray.config import DataConfig
from cactus_ray.data import SPLITS, DataSet, calibration, load, load_split, sources
from cactus_ray.data.sources import SOURCES
from cactus_ray.errors import ConfigError, UserError

DIGESTS = {
    "train": "e98af40f57f8e3682c79ba0fc8debd9fb622fec263899cfc8f085d97782086b5",
    "selection": "96effe40d2f7577ce9d1cc071f9644bfd0e1b9ba0684e51406798933d5c331fe",
    "test": "d422799ca308f41bb89134d4766b086cccd608cb4cd099973d2b48015f6296ab",
}


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load(DataConfig(name="digits"))


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_sources_are_what_the_configuration_offers() -> None:
    (field,) = (f for f in dataclasses.fields(DataConfig) if f.name == "name")
    assert tuple(SOURCES) == field.metadata["choices"]


def test_digits_are_the_real_ones(digits: DataSet) -> None:
    assert {k: tuple(v.shape) for k, v in digits.images.items()} == {
        "train": (1151, 1, 8, 8),
        "selection": (287, 1, 8, 8),
        "test": (359, 1, 8, 8),
    }
    assert digits.input_shape == (1, 8, 8)
    assert digits.classes == 10
    everything = torch.cat([digits.split(s)[0] for s in SPLITS])
    assert everything.dtype == torch.float32
    assert (everything.min(), everything.max()) == (0.0, 1.0)
    assert rows(everything) == rows(torch.from_numpy(load_digits().images / 16).float())


def test_digits_splits_share_no_image(digits: DataSet) -> None:
    train, selection, test = (rows(digits.split(s)[0]) for s in SPLITS)
    assert len(train | selection | test) == len(train) + len(selection) + len(test)


def test_digits_are_stratified(digits: DataSet) -> None:
    total = torch.bincount(torch.cat([digits.split(s)[1] for s in SPLITS]))
    for split, share in (("train", 0.64), ("selection", 0.16), ("test", 0.2)):
        counts = torch.bincount(digits.split(split)[1])
        assert ((counts - share * total).abs() <= 1).all()


def test_digests_are_pinned_and_belong_to_a_split(digits: DataSet) -> None:
    assert digits.digests == DIGESTS
    assert load(DataConfig(name="digits"), ("selection",)).digests == {"selection": DIGESTS["selection"]}


def test_load_is_cached_and_reads_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = SOURCES["digits"]

    def source(root: str | None, image_size: int | None, split: str) -> sources.Samples:
        asked.append(split)
        return original(root, image_size, split)

    monkeypatch.setitem(SOURCES, "digits", source)
    config = DataConfig(name="digits", root="a root of its own")  # a key that no other test has cached
    first = load(config, ("train", "selection"))
    assert asked == ["train", "selection"]
    assert load(config, ("train",)).images["train"] is first.images["train"]
    assert asked == ["train", "selection"]
    with pytest.raises(KeyError, match="test"):
        first.split("test")


def test_train_samples_is_a_fixed_subset_of_train_only(digits: DataSet) -> None:
    few = load(DataConfig(name="digits", train_samples=100))
    assert len(few.images["train"]) == len(few.labels["train"]) == 100
    assert rows(few.images["train"]) <= rows(digits.images["train"])
    assert few.digests["train"] != DIGESTS["train"]
    assert few.digests["selection"] == DIGESTS["selection"]


def test_calibration_is_fixed_and_from_train(digits: DataSet) -> None:
    images, labels = calibration(digits, 50)
    again, _ = calibration(digits, 50)
    assert images.shape == (50, 1, 8, 8)
    assert labels.shape == (50,)
    assert torch.equal(images, again)
    assert rows(images) <= rows(digits.images["train"])
    assert len(calibration(digits, 10_000)[1]) == 1151


def test_load_split_addresses_the_same_samples(digits: DataSet) -> None:
    images, labels = load_split("digits", "test")
    assert torch.equal(images, digits.images["test"])
    assert torch.equal(labels, digits.labels["test"])


def test_mnist_is_the_real_one(test_data: Path) -> None:
    data = load(DataConfig(name="mnist", root=str(test_data)), ("selection", "test"))
    images, labels = data.split("test")
    assert images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]  # what the files are known to begin with
    assert float(images.max()) == 1.0
    assert images.mean().item() == pytest.approx(0.1325, abs=1e-4)
    images, labels = data.split("selection")
    assert images.shape == (5_000, 1, 28, 28)
    assert torch.bincount(labels).min() > 400
    assert data.digests == {
        "selection": "d1bda7eb766419929dd34e0d9d7a2cec09236fa7f1b1dcb2c55fdaa65532e254",
        "test": "8c26786d4955bfbe4b1bc0048b3bedb22913ad773005ea62cd29f5c431131685",
    }


def test_mnist_train_and_selection_are_the_sixty_thousand(test_data: Path) -> None:
    (train, train_labels), (selection, selection_labels) = (
        load_split("mnist", split, str(test_data)) for split in ("train", "selection")
    )
    assert (len(train), len(selection)) == (55_000, 5_000)
    counts = torch.bincount(train_labels) + torch.bincount(selection_labels)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert not rows(train) & rows(selection)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "test"), r"data\.root: got None; expected the folder that holds MNIST/raw/t10k-images"),
        (("mnist", "train", "/nowhere"), r"data\.root: got '/nowhere'; expected .*MNIST/raw/train-images"),
        (("digits", "validation"), "split: got 'validation'; expected one of train, selection, test"),
        (("cifar", "test"), r"data\.name: got 'cifar'; expected one of digits"),
        (("digits", "test", None, 16), r"data\.image_size: got 16; expected nothing"),
        (("image_folder", "test"), r"data\.root: got None; expected a folder that holds train/CLASS"),
    ],
)
def test_bad_requests_say_what_would_be_right(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_split(*arguments)


@pytest.mark.parametrize("content", [None, b"", b"\x00\x00\x08\x03 cut off"])
def test_broken_mnist_is_refused(tmp_path: Path, content: bytes | None) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    if content is not None:
        for prefix in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="MNIST cannot be read"):
        load_split("mnist", "test", str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "rows", "split", "message"),
    [
        ([3, 200], 2, "test", "the test split has labels from 3 to 200; expected MNIST"),
        ([1] * 100, 100, "train", "the train split has no images; expected MNIST"),
    ],
)
def test_what_is_not_mnist_is_refused(labels: list[int], rows: int, split: str, message: str, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        sizes = b"".join(n.to_bytes(4, "big") for n in (rows, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes(rows * 28 * 28))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + rows.to_bytes(4, "big") + bytes(labels))
    with pytest.raises(UserError, match=message):
        load_split("mnist", split, str(tmp_path))


def test_pixels_outside_of_the_domain_are_refused() -> None:
    data = load(DataConfig(name="digits"), ("train", "selection"))
    data.refuse_outside((0.0, 1.0))
    data.refuse_outside((-1.0, 2.0))
    for domain in ((0.2, 1.0), (0.0, 0.8)):
        with pytest.raises(
            ConfigError, match=r"threat\.domain: got .*expected an interval that holds .*digits, 0 to 1"
        ):
            data.refuse_outside(domain)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("count", [3, 5])
def test_mnist_with_other_labels_than_images_is_refused(count: int, split: str, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        sizes = b"".join(n.to_bytes(4, "big") for n in (4, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes(4 * 28 * 28))
        labels = count.to_bytes(4, "big") + bytes(count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + labels)
    with pytest.raises(UserError, match=rf"{count} labels for 4 images; expected the folder that holds MNIST/raw"):
        load_split("mnist", split, str(tmp_path))
