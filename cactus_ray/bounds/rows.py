"""Linear forms over a node's output, kept as small windows while they touch only a part of it.

A backward bound starts at single neurons. Behind a convolution a neuron sees only a patch of the map, so its
coefficients are kept as a window with an origin until it has grown to the whole map (what Xu et al. 2020 call
"patches"). Positions of a window outside the map always hold coefficient 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """S linear forms per sample: ``sum(coefficients * x)`` over a node's output x of shape [B, *shape].

    ``coefficients``: [B, S, *shape], or windows [B, S, C, h, w] whose top left corner lies at ``origin`` [B, S, 2]
    (row, column; may be negative) of a map [C, H, W].
    """

    coefficients: Tensor
    origin: Tensor | None = None

    def over(self, values: Tensor) -> Tensor:
        """``values`` [B, *shape] where the coefficients are: broadcasts against them. 0 outside the map."""
        return self.overs(values)[0]

    def overs(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each of ``values`` [B, *shape] as of ``over``, looked up together."""
        if self.origin is None:
            return tuple(value[:, None] for value in values)
        index, inside = self._places(values[0].shape[-2], values[0].shape[-1])
        batch, count, _ = index.shape
        maps = torch.cat(values, 1).flatten(2)[:, None].expand(-1, count, -1, -1)
        found = maps.gather(3, index[:, :, None].expand(-1, -1, maps.shape[2], -1))
        # not a product: a NaN or infinity of the map must not leak out of the padding
        found = found.masked_fill_(~inside[:, :, None], 0.0)
        found = found.view(batch, count, maps.shape[2], *self.coefficients.shape[-2:])
        return torch.split(found, [value.shape[1] for value in values], dim=2)

    def inside(self, shape: Shape) -> Rows:
        """The same forms with zeros outside the map; dense once a window is no smaller than half the map."""
        if self.origin is None:
            return self
        height, width = self.coefficients.shape[-2:]
        _, inside = self._places(shape[-2], shape[-1])
        mask = inside.view(*inside.shape[:2], 1, height, width)
        clean = Rows(self.coefficients.masked_fill(~mask, 0.0), self.origin)
        return clean.dense(shape) if 2 * height * width >= shape[-2] * shape[-1] else clean

    def dense(self, shape: Shape) -> Rows:
        """The same forms with coefficients [B, S, *shape]."""
        if self.origin is None:
            return self
        index, inside = self._places(shape[-2], shape[-1])
        windows = self.coefficients.flatten(3).masked_fill(~inside[:, :, None], 0.0)
        batch, count, channels, _ = windows.shape
        full = windows.new_zeros(batch, count, channels, shape[-2] * shape[-1])
        full.scatter_add_(3, index[:, :, None].expand_as(windows), windows)
        return Rows(full.view(batch, count, *shape))

    def plus(self, other: Rows, shape: Shape) -> Rows:
        """Sum of two sets of forms over the same node of the given shape."""
        if self.origin is None and other.origin is None:
            return Rows(self.coefficients + other.coefficients)
        left, right = self.dense(shape), other.dense(shape)
        return Rows(left.coefficients + right.coefficients)

    def dot(self, values: Tensor) -> Tensor:
        """``sum(coefficients * values)`` [B, S] for values [B, *shape]."""
        return contract(self.coefficients, self.over(values))

    def absolute(self) -> Rows:
        """The forms with the absolute values of the coefficients."""
        return Rows(self.coefficients.abs(), self.origin)

    def with_negatives(self) -> Rows:
        """These S forms, then their negatives: 2 S forms."""
        origin = None if self.origin is None else torch.cat([self.origin, self.origin], 1)
        return Rows(torch.cat([self.coefficients, -self.coefficients], 1), origin)

    def _places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Flat map index [B, S, h*w] of every window position (clamped), and whether it lies on the map."""
        assert self.origin is not None
        h, w = self.coefficients.shape[-2:]
        y = self.origin[..., 0, None] + torch.arange(h, device=self.origin.device)
        x = self.origin[..., 1, None] + torch.arange(w, device=self.origin.device)
        index = y.clamp(0, height - 1)[..., :, None] * width + x.clamp(0, width - 1)[..., None, :]
        inside = ((y >= 0) & (y < height))[..., :, None] & ((x >= 0) & (x < width))[..., None, :]
        return index.flatten(2), inside.flatten(2)


def contract(coefficients: Tensor, values: Tensor) -> Tensor:
    """``sum(coefficients * values)`` [B, S] over all but the first two dimensions; values may broadcast over S."""
    if values.shape[1] == 1:
        return torch.matmul(coefficients.flatten(2), values.flatten(2).transpose(1, 2)).squeeze(2)
    return (coefficients * values).flatten(2).sum(2)


def unit_rows(index: Tensor, shape: Shape, dtype: torch.dtype) -> Rows:
    """Forms that pick single neurons: ``index`` [B, S] are flat positions in a node of the given shape.

    Maps [C, H, W] give windows of one pixel, anything else dense rows.
    """
    if len(shape) == 3 and shape[1] * shape[2] > 1:
        pixels = shape[1] * shape[2]
        channel, place = index // pixels, index % pixels
        one = torch.zeros(*index.shape, shape[0], dtype=dtype, device=index.device).scatter_(2, channel[..., None], 1.0)
        origin = torch.stack([place // shape[2], place % shape[2]], dim=2)
        return Rows(one[..., None, None], origin)
    size = math.prod(shape)
    full = torch.zeros(*index.shape, size, dtype=dtype, device=index.device).scatter_(2, index[..., None], 1.0)
    return Rows(full.view(*index.shape, *shape))
