"""Crops and flips: exactly the shifted and mirrored images, each place equally often, nothing when off."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.config import TrainConfig
from cactus_ray.training.augment import augment, draw

IMAGES = torch.rand(300, 3, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1


def places(image: Tensor, padding: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every image that augmentation may make of one, by brute force."""
    found = {}
    for mirrored in (False, True) if flip else (False,):
        padded = F.pad(image.flip(2) if mirrored else image, (padding,) * 4)
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                crop = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
                found[crop.contiguous().numpy().tobytes()] = (down, right, mirrored)
    return found


def seen(train: TrainConfig, padding: int, flip: bool) -> list[tuple[int, int, bool]]:
    draws = draw(train, len(IMAGES), torch.Generator().manual_seed(1))
    moved = augment(IMAGES, draws, train)
    assert moved.shape == IMAGES.shape
    assert moved.is_contiguous()
    return [
        places(image, padding, flip)[new.numpy().tobytes()] for image, new in zip(IMAGES, moved, strict=True)
    ]  # fmt: skip


def test_every_image_is_one_of_its_crops_and_all_occur() -> None:
    found = seen(TrainConfig(crop_padding=1, flip=True), 1, True)
    assert len(set(found)) == 18
    assert 110 < sum(mirrored for _, _, mirrored in found) < 190


def test_crop_alone_and_flip_alone() -> None:
    assert set(seen(TrainConfig(crop_padding=2), 2, False)) == {(i, j, False) for i in range(5) for j in range(5)}
    assert set(seen(TrainConfig(flip=True), 0, True)) == {(0, 0, False), (0, 0, True)}


def test_off_is_the_same_run_as_absent(run_config: Any) -> None:
    plain = run_config()
    off = run_config(train__crop_padding=0, train__flip=False, train__average="none")
    assert off == plain
    assert off.config_hash == plain.config_hash
    draws = draw(plain.train, 10, torch.Generator().manual_seed(0))
    assert len(draws) == 0
    assert augment(IMAGES, draws, plain.train) is IMAGES


def test_a_draw_at_the_end_stays_inside() -> None:
    last = torch.full((300, 3), 1.0)  # float32 rounds a draw just below 1, times 3, up to 3
    moved = augment(IMAGES, last, TrainConfig(crop_padding=1))
    assert torch.equal(moved[:, :, :-1, :-1], IMAGES[:, :, 1:, 1:])
    assert not moved[:, :, -1].any()
