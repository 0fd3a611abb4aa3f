"""CIFAR-10 in the publisher's two layouts, on small archives; above all: nothing in a pickle is run."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cactus_ray.config import DataConfig
from cactus_ray.data import load, load_split
from cactus_ray.errors import UserError

ROWS = 40
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def content(seed: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.Generator(np.random.PCG64(seed))
    return random.integers(0, 256, (ROWS, 3072), dtype=np.uint8), (np.arange(ROWS) % 10).tolist()


def as_python_2_wrote_it(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of the published batches (protocol 2 of Python 2): strings of bytes, numpy's names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    )
    shape = number(len(pixels)) + number(3072) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + numbers
    return b"\x80\x02}(" + entries + text(b"data") + array + b"u."


def write(root: Path, version: str) -> Path:
    folder = root / ("cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(FILES):
        pixels, labels = content(seed)
        if version == "binary":
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        elif version == "python 2":
            (folder / name).write_bytes(as_python_2_wrote_it(pixels, labels))
        else:
            (folder / name).write_bytes(pickle.dumps({b"labels": labels, b"data": pixels}, protocol=2))
    return folder


@pytest.mark.parametrize("version", ["python 2", "python 3", "binary"])
@pytest.mark.parametrize("inside", [False, True])
def test_pixels_and_labels(version: str, inside: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, version)
    data = load(DataConfig(name="cifar10", root=str(folder if inside else tmp_path)))
    assert {k: len(v) for k, v in data.labels.items()} == {"train": 180, "selection": 20, "test": ROWS}
    assert data.class_names[:2] == ("airplane", "automobile")
    assert data.input_shape == (3, 32, 32)
    pixels, labels = content(5)
    images, found = data.split("test")
    assert found.tolist() == labels
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert images.dtype == torch.float32
    everything = torch.cat([data.images["train"], data.images["selection"]])
    wanted = np.concatenate([content(seed)[0] for seed in range(5)])
    assert {i.numpy().tobytes() for i in (everything * 255).round().byte()} == {row.tobytes() for row in wanted}


def test_all_versions_are_the_same_data(tmp_path: Path) -> None:
    digests = []
    for version in ("python 2", "python 3", "binary"):
        write(tmp_path / version, version)
        digests.append(load(DataConfig(name="cifar10", root=str(tmp_path / version))).digests)
    assert digests[0] == digests[1] == digests[2]


def test_the_python_2_fixture_is_what_numpy_would_read(tmp_path: Path) -> None:
    """An unrestricted unpickler (here on our own bytes) reads the same array from the fixture."""
    pixels, labels = content(0)
    found = pickle.loads(as_python_2_wrote_it(pixels, labels), encoding="bytes")
    assert np.array_equal(found[b"data"], pixels)
    assert found[b"labels"] == labels


class _Attack:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("where", ["value", "inside the array", "key"])
def test_a_pickle_that_would_run_code_runs_nothing(where: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "python 3")
    mark = tmp_path / "mark"
    attack = _Attack(os.mkdir, str(mark))
    pixels, labels = content(5)
    batch: dict[Any, Any] = {b"labels": labels, b"data": pixels}
    if where == "value":
        batch[b"extra"] = attack
    elif where == "key":
        batch[_Attack(os.mkdir, str(mark))] = 1
    else:
        batch[b"data"] = attack
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=r"test_batch: not a batch .*it asks for \w+\.mkdir"):
        load_split("cifar10", "test", str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "reach", [b"cbuiltins\neval\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nfromfile\n", b"ccodecs\nopen\n"]
)
def test_other_names_are_out_of_reach(reach: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path, "python 3")
    (folder / "test_batch").write_bytes(b"\x80\x02" + reach + b"U\x01x\x85R.")
    with pytest.raises(UserError, match="it asks for"):
        load_split("cifar10", "test", str(tmp_path))


@pytest.mark.parametrize(
    "batch",
    [
        {b"labels": [1], b"data": np.zeros((1, 3072), np.float32)},
        {b"labels": [1], b"data": np.zeros((1, 3071), np.uint8)},
        {b"labels": [1], b"data": np.zeros(3072, np.uint8)},
        {b"labels": [1, 2], b"data": np.asfortranarray(np.zeros((2, 3072), np.uint8))},
        {b"labels": [1, 2], b"data": np.zeros((1, 3072), np.uint8)},
        {b"labels": [10], b"data": np.zeros((1, 3072), np.uint8)},
        {b"labels": ["one"], b"data": np.zeros((1, 3072), np.uint8)},
        {b"fine_labels": [1], b"data": np.zeros((1, 3072), np.uint8)},
        {b"labels": [1], b"data": [[0] * 3072]},
        {b"labels": np.zeros(1, np.uint8), b"data": np.zeros((1, 3072), np.uint8)},
        [1, 2],
    ],
)
def test_other_contents_are_refused_by_name(batch: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, "python 3")
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match="test_batch: "):
        load_split("cifar10", "test", str(tmp_path))


@pytest.mark.parametrize("version", ["python 2", "python 3", "binary"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "memo"])
def test_damaged_files_are_named(version: str, damage: str, tmp_path: Path) -> None:
    """memo: a pickle of a few bytes for which C code would fill 64 GB."""
    folder = write(tmp_path, version)
    path = folder / ("data_batch_3.bin" if version == "binary" else "data_batch_3")
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        content = {"cut": whole[:-5000], "empty": b"", "text": b"hello", "memo": b"\x80\x02]r\xff\xff\xff\xff."}
        path.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"data_batch_3(\.bin)?: "):
        load_split("cifar10", "train", str(tmp_path))
    assert len(load_split("cifar10", "test", str(tmp_path))[1]) == ROWS


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for root in (None, str(tmp_path)):
        with pytest.raises(UserError, match=r"data\.root: got .*cifar-10-batches-py or cifar-10-batches-bin"):
            load_split("cifar10", "test", root)
    with pytest.raises(UserError, match=r"data\.image_size: got 16"):
        load_split("cifar10", "test", str(tmp_path), image_size=16)


def test_a_selection_split_of_no_image_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "binary")
    for name in FILES[1:5]:
        (folder / f"{name}.bin").unlink()
        (folder / f"{name}.bin").write_bytes((folder / "data_batch_1.bin").read_bytes()[: 1 + 3072])
    (folder / "data_batch_1.bin").write_bytes((folder / "data_batch_2.bin").read_bytes())
    assert len(load_split("cifar10", "train", str(tmp_path))[1]) == 5
    with pytest.raises(UserError, match="the selection split of cifar10 has no images; expected more images"):
        load_split("cifar10", "selection", str(tmp_path))
