"""Weights near the current ones, each within its radius: perturbations as tensors by name, to be added with ``apply``.

The worst ones (adversarial weight perturbation in linf: CACTUS, Sec. 4.2 and Eq. 9) by ``jump`` or ``ascend``; and two
that cost nothing beside the member's own passes: random ones (``noise``) and those of rounding (``rounding``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import Level
from cactus_ray.compression.quantize import affine_step, float_step
from cactus_ray.compression.quantize import step as symmetric_step
from cactus_ray.config import AWP_UNITS
from cactus_ray.training.workers import Workers


def radii(graph: Graph, params: Params, radius: float, unit: str) -> Params:
    """How far each convolution's and linear layer's weight may move; each broadcasts to its weight.

    ``radius`` >= 0 in ``unit``: "step" (symmetric int8 step of the output channel; 0.5 covers rounding to int8
    exactly), any other format of levels whose weights are integers or floating point ("int4", "int4:tensor:affine",
    "fp16": the step of that format, of the tensor, or between the floats around each weight), "std" (standard
    deviation of the tensor), "absolute", or "relative" (to each weight's magnitude). Biases and batch norm are not
    perturbed: integers do not touch them. Steps are those of the weights before batch norm is merged into them, which
    only steps of a channel follow exactly. Detached from ``params``.
    """
    if unit not in AWP_UNITS:
        raise ValueError(f"unit {unit!r}")
    found: Params = {}
    with torch.no_grad():
        for node in graph.weighted():
            name = f"{node.name}.weight"
            weight = params[name].detach()
            match unit:
                case "std":
                    size = weight.std(correction=0)
                case "absolute":
                    size = weight.new_ones(())
                case "relative":
                    size = weight.abs()
                case "fp16":
                    size = float_step(weight, 10, -14)
                case "bf16":
                    size = float_step(weight, 7, -126)
                case _:
                    size = _integer_step(weight, Level(quantise="int8" if unit == "step" else unit))
            found[name] = radius * size
    return found


def _integer_step(weight: Tensor, level: Level) -> Tensor:
    """[out, 1, ...] or [1, 1, ...]"""
    assert level.bits is not None
    size = (affine_step if level.affine else symmetric_step)(weight, level.bits, per_tensor=level.per_tensor)
    return size.view(-1, *([1] * (weight.dim() - 1)))


def jump(gradients: Params, limits: Params) -> Params:
    """The perturbations after one whole sign step from zero: the maximum of the linearised loss within ``limits``."""
    return {name: limit * gradients[name].sign() for name, limit in limits.items()}


def ascend(
    loss: Callable[[Params], Tensor], params: Params, limits: Params, steps: int, workers: Workers | None = None
) -> Params:
    """Perturbations by tensor name that raise ``loss(params + perturbation)``, elementwise within ``limits``.

    ``steps`` >= 1 sign-gradient steps from zero, each of min(1, 2 / steps) times the limit and projected. Detached;
    no gradient reaches ``params``. ``workers``: the loss is the mean of theirs, and all of them find the same.
    """
    fixed = {name: tensor.detach() for name, tensor in params.items()}
    deltas = {name: torch.zeros_like(fixed[name]) for name in limits}
    share = min(1.0, 2.0 / steps)
    for _ in range(steps):
        leaves = {name: delta.requires_grad_(True) for name, delta in deltas.items()}
        gradients = list(torch.autograd.grad(loss(apply(fixed, leaves)), list(leaves.values())))
        if workers is not None:
            workers.mean_(gradients)
        deltas = {
            name: torch.clamp(delta.detach() + share * limits[name] * g.sign(), -limits[name], limits[name])
            for (name, delta), g in zip(leaves.items(), gradients, strict=True)
        }
    return deltas


def noise(params: Params, limits: Params, generator: torch.Generator) -> Params:
    """Perturbations drawn uniformly within ``limits``; ``generator`` on the device of ``params``."""
    found = {}
    for name, limit in limits.items():
        draws = torch.rand(params[name].shape, generator=generator, dtype=params[name].dtype, device=limit.device)
        found[name] = limit * (2.0 * draws - 1.0)
    return found


def rounding(params: Params, limits: Params) -> Params:
    """Perturbations that bring every weight to the grid of step ``2 * limit`` through 0, ties to even.

    Half a step of a format gives the weights of that level, but where an affine range ends in two ties, of which the
    level clips one. They are detached, so that the gradient reaches the weights as if they were not rounded
    (straight-through estimator: Bengio et al. 2013).
    """
    found = {}
    for name, limit in limits.items():
        weight = params[name].detach()
        grid = torch.where(limit > 0, 2.0 * limit, 1.0)
        found[name] = torch.where(limit > 0, torch.round(weight / grid) * grid - weight, 0.0)
    return found


def apply(params: Params, deltas: Params) -> Params:
    """``params`` with the perturbations added; differentiable in both."""
    return params | {name: params[name] + delta for name, delta in deltas.items()}
