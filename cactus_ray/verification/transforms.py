"""Random transformations of images that keep their meaning: rotation, brightness, contrast, blur, noise.

Written ``NAME:AMOUNT``, or several that follow each other: ``rotation:15+brightness:0.2``. The amount sets the
distribution from which every application draws anew (``KINDS``); a seeded generator makes the draws reproducible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.errors import ConfigError

Domain = tuple[float, float]
_NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_BLUR_REACH = 3.0  # standard deviations after which the kernel is cut off
_SHARP = 1e-6  # standard deviation that stands for 0: all weight is in the middle


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of transformation.

    ``apply(images, amount, generator, domain)``: images float32 [N, C, H, W], each changed by a draw of its own, not
    yet clipped. ``largest``: largest amount; ``words``: the distribution, with ``{a}`` for the amount.
    """

    apply: Callable[[Tensor, float, torch.Generator, Domain], Tensor]
    largest: float
    words: str


@dataclass(frozen=True, slots=True)
class Transform:
    """Kinds and their amounts, applied from left to right. ``str(transform)`` is its canonical text."""

    steps: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return "+".join(f"{name}:{_text(amount)}" for name, amount in self.steps)

    @property
    def words(self) -> str:
        """What is drawn, and from which distribution."""
        return ", then ".join(KINDS[name].words.format(a=_text(amount)) for name, amount in self.steps)


def parse_transforms(text: str, path: str) -> tuple[Transform, ...]:
    """The transformations in a text, separated by commas.

    Raises ConfigError (with ``path``, the text and what would be right) for an unknown name, an amount that is no
    number or out of range, and a transformation that stands twice.
    """
    found: list[Transform] = []
    for part in text.split(","):
        transform = Transform(tuple(_step(step.strip(), text, path) for step in part.split("+")))
        if transform in found:
            raise ConfigError(path, text, f"each transformation once; {transform} stands twice")
        found.append(transform)
    return tuple(found)


def _text(amount: float) -> str:
    return repr(amount).removesuffix(".0")


def _step(step: str, text: str, path: str) -> tuple[str, float]:
    name, _, number = step.partition(":")
    if name not in KINDS:
        raise ConfigError(path, text, f"NAME:AMOUNT with a name out of {', '.join(KINDS)}; {name!r} is none of them")
    largest = KINDS[name].largest
    if not _NUMBER.fullmatch(number) or not float(number) <= largest:
        raise ConfigError(path, text, f"{name}:AMOUNT with a number in [0, {largest:g}]; got {number!r}")
    return name, float(number)


@torch.no_grad()
def draw(transform: Transform, image: Tensor, count: int, generator: torch.Generator, domain: Domain) -> Tensor:
    """``count`` independent random transformations of one image [C, H, W]: float32 [count, C, H, W] in ``domain``.

    Every step draws from the CPU ``generator`` and is clipped to the domain. Deterministic for a generator's state.
    """
    images = image.float().expand(count, *image.shape)
    for name, amount in transform.steps:
        images = KINDS[name].apply(images, amount, generator, domain).clamp(*domain)
    return images.contiguous()


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Float64 [count, 1, 1, 1]."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    return (low + (high - low) * draws).view(-1, 1, 1, 1)


def _rotation(images: Tensor, amount: float, generator: torch.Generator, domain: Domain) -> Tensor:
    height, width = images.shape[2:]
    angle = math.radians(1.0) * _uniform(len(images), -amount, amount, generator).flatten()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # the grid's unit is half a side, so that the sides' ratio keeps an angle an angle where they differ
    rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3).float(), list(images.shape), align_corners=False)
    black = domain[0]
    turned = F.grid_sample(images - black, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned + black


def _brightness(images: Tensor, amount: float, generator: torch.Generator, domain: Domain) -> Tensor:
    return images + _uniform(len(images), -amount, amount, generator).float()


def _contrast(images: Tensor, amount: float, generator: torch.Generator, domain: Domain) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + _uniform(len(images), 1.0 - amount, 1.0 + amount, generator).float() * (images - mean)


def _blur(images: Tensor, amount: float, generator: torch.Generator, domain: Domain) -> Tensor:
    reach = math.ceil(_BLUR_REACH * amount)
    sigma = _uniform(len(images), 0.0, amount, generator).clamp(min=_SHARP)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernels = torch.exp(-0.5 * (offsets / sigma.flatten()[:, None]) ** 2)
    weights = (kernels / kernels.sum(1, keepdim=True)).float()
    for axis in (2, 3):  # a Gaussian of the plane is one along each axis
        size = images.shape[axis]
        sides = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded = F.pad(images, sides, mode="replicate")
        parts = (weights[:, k].view(-1, 1, 1, 1) * padded.narrow(axis, k, size) for k in range(len(offsets)))
        images = sum(parts, torch.zeros_like(images))
    return images


def _noise(images: Tensor, amount: float, generator: torch.Generator, domain: Domain) -> Tensor:
    return images + amount * torch.randn(images.shape, generator=generator)


KINDS: dict[str, Kind] = {
    "rotation": Kind(
        _rotation, 180.0,
        "rotated about the middle by an angle uniform in [-{a}, {a}] degrees, bilinear, black where nothing was",
    ),
    "brightness": Kind(_brightness, 1.0, "one number uniform in [-{a}, {a}] added to all pixels"),
    "contrast": Kind(_contrast, 1.0, "differences from the image's mean times a factor uniform in [1 - {a}, 1 + {a}]"),
    "blur": Kind(
        _blur, 10.0, "blurred with a Gaussian of standard deviation uniform in [0, {a}] pixels, edges repeated"
    ),
    "noise": Kind(_noise, 1.0, "independent Gaussian noise of standard deviation {a} added to every pixel"),
}  # fmt: skip
"""All kinds by name. Whatever they do is then clipped to the domain."""
