"""QA-IBP: interval bounds through quantised weights (Lechner et al. 2023).

Two stages, both with the certified loss: pretrain in floating point, while epsilon rises; then every pass, attacks and
bounds included, through weights rounded to ``weight_bits`` bits with straight-through gradients.

Unlike the authors: the grid is that of our levels (symmetric, a scale per output channel instead of a fixed point for
all, so that the level of that width changes nothing any more); biases and activations stay floating-point numbers, as
in those levels; the loss is one of ours, not a hinge on margins with a penalty on widths; and batch norm is allowed.
A plain straight-through estimator loses a tenth of the certificates at 4 bits, which ``SIGN`` wins back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.quantize import dequantize, quantize
from cactus_ray.config import RunConfig
from cactus_ray.training.stages import Stage
from cactus_ray.training.step import Step, full_loss

SIGN = 1e-20
"""What stands for 0 in training, with the weight's sign: no sum of a network notices it.

The radii of interval bounds have gradients sign(w), which draw small weights to 0. At a rounded 0 the sign would be 0
and that pull would end half a step from 0, where weights then gather and flicker between 0 and a whole step.
"""


def qa_ibp(step: Step) -> Iterator[Tensor]:
    """Standard and certified loss of the stage's network."""
    assert step.config.certified_loss is not None
    loss, _ = full_loss(step, step.config.certified_loss)
    yield loss


def _quantised(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    """Every convolution's and linear layer's weight as the level of ``weight_bits`` bits stores it."""
    names = [f"{node.name}.weight" for node in graph.weighted()]
    smallest = SIGN if torch.is_grad_enabled() else 0.0
    return params | {k: _Rounded.apply(params[k], config.weight_bits, smallest) for k in names}  # type: ignore[no-untyped-call]


class _Rounded(torch.autograd.Function):
    """The weight on its grid; the gradient goes straight through (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, smallest: float) -> Tensor:
        rounded = dequantize(*quantize(weight, bits)).to(weight.dtype)
        return torch.where(rounded == 0.0, smallest * weight.sign(), rounded) if smallest else rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient, None, None


STAGES = (Stage("pretrain"), Stage("quantised", network=_quantised))
