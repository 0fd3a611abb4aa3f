"""Rounding weights to integer codes, such that zero is a code: pruned and nearly pruned weights stay exactly 0.

Symmetric (the default) or affine, with one scale per output channel (the default) or per tensor. A grid without zero
destroys certificates (interval radii sum over thousands of tiny weights), so the affine zero point is an integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-12


def largest_code(bits: int) -> int:
    """Symmetric codes of ``bits`` bits lie in [-largest, largest]: 127 for 8, 7 for 4, 1 for 2 (ternary)."""
    _check(bits)
    return int(2 ** (bits - 1)) - 1


def step(weight: Tensor, bits: int = 8, *, per_tensor: bool = False) -> Tensor:
    """Size of the symmetric quantisation step of every output channel: [out], or [1] per tensor; at least 1e-12.

    ``weight`` [out, ...]; the step is ``max|w| / (2^(bits-1) - 1)`` over the channel or tensor, in the weight's dtype.
    Not differentiable.
    """
    largest = _rows(weight.detach(), per_tensor=per_tensor).abs().amax(dim=1)
    return (largest / largest_code(bits)).clamp(min=SMALLEST_SCALE)


def affine_step(weight: Tensor, bits: int, *, per_tensor: bool = False) -> Tensor:
    """Likewise the affine step: the range of the weights, widened to hold 0, over ``2^bits - 1``."""
    _check(bits)
    low, high = _range(weight, per_tensor=per_tensor)
    return ((high - low) / int(2**bits - 1)).clamp(min=SMALLEST_SCALE)


def float_step(weight: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Distance of neighbouring floating-point numbers of a format at every weight float32: the shape of ``weight``.

    fp16 has 10 bits behind the point and normal numbers from 2^-14, bf16 7 and 2^-126. The step at w is
    ``2^(max(floor(log2 |w|), smallest_exponent) - mantissa_bits)``; overflow is not looked at. Not differentiable.
    """
    bits = weight.detach().float().view(torch.int32)
    power_below = bits.bitwise_and(0x7F800000).view(torch.float32)  # 2^floor(log2 |w|), exactly
    return power_below.clamp(min=2.0**smallest_exponent) * float(2.0**-mantissa_bits)


def quantize(weight: Tensor, bits: int, *, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric codes int8 (shape of ``weight``) and scale float32 [out] or [1], rounding half to even.

    Guarantees: 0 -> code 0; ``|w - code * scale| <= scale / 2`` in real arithmetic. Computed in float64 from the
    float32 scale that will be stored.
    """
    scale = step(weight.double(), bits, per_tensor=per_tensor).float()
    return quantize_with(weight, scale, bits), scale


def quantize_with(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric codes int8 of a weight for given scales float32 [out] or [1]; rounds half to even."""
    largest = largest_code(bits)
    codes = torch.round(weight.detach().double() / _columns(scale, weight).double()).clamp(-largest, largest)
    return codes.to(torch.int8)


def quantize_affine(weight: Tensor, bits: int, *, per_tensor: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (shape of ``weight``), scale float32 and zero point uint8, both [out] or [1].

    The range [min w, max w] is widened to hold 0 and divided into ``2^bits - 1`` steps; the weight of code q is
    ``(q - zero_point) * scale`` with an integer zero point, so 0 is exact. What is returned is ``(q - zero_point) mod
    2^bits``: a weight of 0 has the code 0, as sparse storage needs it, in the same ``bits`` bits. The error is at most
    half a step, up to the rounding of the scale to float32.
    """
    weight = weight.detach().double()
    scale = affine_step(weight, bits, per_tensor=per_tensor).float()
    low, _ = _range(weight, per_tensor=per_tensor)
    zero_point = torch.round(-low / scale.double()).clamp(0, 2**bits - 1)
    offset = _columns(zero_point, weight)
    codes = torch.round(weight / _columns(scale, weight).double()) + offset
    found = (codes.clamp(0, 2**bits - 1) - offset).remainder(2**bits)
    return found.to(torch.uint8), scale, zero_point.to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8) -> Tensor:
    """``float32(code) * float32(scale)``: one rounding, as onnxruntime computes it.

    With a ``zero_point``, ``codes`` are those of ``quantize_affine`` in ``bits`` bits.
    """
    steps = codes.float()
    if zero_point is not None:
        offset = _columns(zero_point.float(), codes)
        steps = torch.fmod(steps + offset, 2.0**bits) - offset  # whole numbers below 2^9: exact
    return steps * _columns(scale.float(), codes)


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits}; expected 2 to 8")


def _rows(weight: Tensor, *, per_tensor: bool) -> Tensor:
    """[groups, values]: the values that share a scale."""
    return weight.reshape(1, -1) if per_tensor else weight.flatten(1)


def _range(weight: Tensor, *, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """[groups] each: the smallest weight or 0, the largest or 0."""
    rows = _rows(weight.detach(), per_tensor=per_tensor)
    return rows.amin(dim=1).clamp(max=0.0), rows.amax(dim=1).clamp(min=0.0)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """[out] or [1] so that it broadcasts over the output channels of ``like``."""
    return values.view(-1, *([1] * (like.dim() - 1)))
