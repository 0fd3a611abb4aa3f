"""Symmetric integers per output channel: zero is a code, so pruned and nearly pruned weights stay exactly 0.

Rounding on a grid without zero destroys certificates (interval radii sum over thousands of tiny weights), hence no
affine variant.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-12


def largest_code(bits: int) -> int:
    """Codes of ``bits`` bits lie in [-largest, largest]: 127 for 8, 7 for 4, 1 for 2 (ternary)."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits}; expected 2 to 8")
    return int(2 ** (bits - 1)) - 1


def step(weight: Tensor, bits: int = 8) -> Tensor:
    """Size of the quantisation step of every output channel: [out], in the weight's dtype, at least 1e-12.

    ``weight`` [out, ...]; the step is ``max|w| / (2^(bits-1) - 1)`` over the channel. Not differentiable.
    """
    largest = weight.detach().flatten(1).abs().amax(dim=1)
    return (largest / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 (shape of ``weight``) and scale float32 [out], rounding half to even.

    Guarantees: 0 -> code 0; ``|w - code * scale| <= scale / 2`` in real arithmetic. Computed in float64 from the
    float32 scale that will be stored.
    """
    scale = step(weight.double(), bits).float()
    columns = scale.double().view(-1, *([1] * (weight.dim() - 1)))
    largest = largest_code(bits)
    codes = torch.round(weight.detach().double() / columns).clamp(-largest, largest)
    return codes.to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """``float32(code) * float32(scale)`` per output channel: one rounding, as onnxruntime computes it."""
    return codes.float() * scale.float().view(-1, *([1] * (codes.dim() - 1)))
