"""A network's tensors as its file holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.compression.quantize import dequantize

EXACT = 2**24
"""Sums of whole numbers whose absolute values add up to no more than this are exact in float32, in any order."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as the file holds it.

    kind: "float32", "float16", "bfloat16" (``values`` of that dtype), "integer" (``values`` int8 codes of ``bits``
    bits, int32 ones of 32, ``scale`` float32 [out] or [1]; the tensor is ``float32(code) * scale``, or the codes where
    there is no scale; with a ``zero_point``, uint8 [out] or [1], ``values`` are the uint8 codes of ``quantize_affine``)
    or "codebook" (``values`` uint8 places of ``bits`` bits in ``table`` [2^bits], whose first entry is 0). A value of 0
    is a weight of 0 in all of them.
    """

    kind: str
    values: Tensor
    scale: Tensor | None = None
    bits: int | None = None
    zero_point: Tensor | None = None
    table: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The float32 tensor that onnxruntime computes with, bit for bit."""
        if self.table is not None:
            return self.table.float()[self.values.int()]
        if self.scale is None:
            return self.values.float()
        return dequantize(self.values, self.scale, self.zero_point, self.bits or 8)

    @property
    def signed(self) -> bool:
        """Whether integer codes are two's complement."""
        return self.zero_point is None and self.table is None


@dataclass(frozen=True, slots=True)
class Factored:
    """A weight in three parts of whole numbers: ``scale * (left @ right + multiple * sparse)``, of the given shape.

    ``left`` [out, rank] and ``right`` [rank, columns], or neither; ``sparse`` [out, columns] or None; ``scale`` float32
    and ``multiple`` float16, both [out] or [1]. Whoever loads the file forms the weight, and runtimes sum products
    in different orders: here all sums are of whole numbers and exact (``EXACT``), and one product with the scale is
    rounded, by itself. So the weight is one float32 number whatever the runtime, and bounds are about that number.
    Raises ValueError for parts whose sums may be inexact.
    """

    shape: tuple[int, ...]
    scale: Tensor
    multiple: Tensor
    left: Stored | None
    right: Stored | None
    sparse: Stored | None

    def __post_init__(self) -> None:
        reach = float(self._sum(absolute=True).max())
        if not reach <= EXACT or any(bool((v != v.round()).any()) for v in (s.tensor for s in self.parts.values())):
            raise ValueError(f"parts of a weight reach {reach}; expected whole numbers whose sums stay below {EXACT}")

    @property
    def parts(self) -> dict[str, Stored]:
        """The parts that there are, by name."""
        named = {"left": self.left, "right": self.right, "sparse": self.sparse}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def tensor(self) -> Tensor:
        """The float32 tensor that onnxruntime computes with, bit for bit."""
        return (self._sum().float() * self.scale[:, None]).view(self.shape)

    def _sum(self, *, absolute: bool = False) -> Tensor:
        """``left @ right + multiple * sparse`` [out, columns] in float64; or the same of absolute values."""
        parts = {k: v.tensor.double().abs() if absolute else v.tensor.double() for k, v in self.parts.items()}
        total = torch.zeros((), dtype=torch.float64)
        if "left" in parts:
            total = parts["left"] @ parts["right"]
        return total + self.multiple.double()[:, None] * parts["sparse"] if "sparse" in parts else total


Weight = Stored | Factored
