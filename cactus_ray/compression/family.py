"""All roundings of a quantiser at once: networks whose weights lie within a radius of those of a centre.

The quantiser is that of ``quantize``: symmetric integers per output channel, weights of convolutions and linear layers
only. Its steps are those of the *centre's* weights and stay fixed: a quantiser that chooses other scales (clipping,
per-tensor scales, scales taken again after fine-tuning) makes networks of another family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import INTEGER_BITS
from cactus_ray.compression.quantize import dequantize, largest_code, quantize
from cactus_ray.config import setting

RADII = {"half": 0.5, "one": 1.0}
ZEROS = ("fixed", "free")
UNIT = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Every network whose weights are within ``radius`` steps of the centre's, in real numbers or as float32.

    half: rounding to nearest with any rule for ties, and noise of half a step. one: also rounding down, up, towards
    zero, stochastic and learned rounding to either neighbour. ``zeros`` fixed: weights that are exactly 0 in the
    centre are 0 in every member. That is what a symmetric quantiser does, because 0 is a code, so that down, up and
    nearest are all 0; and a pruned network stays pruned. free: they vary as the others do.
    """

    format: str = setting(doc="format whose steps are meant", choices=tuple(INTEGER_BITS))
    radius: str = setting("half", doc="radius in steps", choices=tuple(RADII))
    zeros: str = setting("free", doc="whether weights that are exactly 0 stay 0", choices=ZEROS)

    def __str__(self) -> str:
        return f"{self.format} +- {self.radius} step"

    @property
    def bits(self) -> int:
        return INTEGER_BITS[self.format]


def radii(graph: Graph, params: Params, family: Family) -> Params:
    """Radius of every weight of the centre ``params`` [*shape], float64, by the name of the tensor.

    ``radius`` steps, and what it costs that the step and the member's weight are float32 numbers. NaN or infinite
    weights have such radii.
    """
    found = {}
    for name, (weight, scale) in _scales(graph, params, family).items():
        step = scale.double().expand_as(weight)
        radius = RADII[family.radius] * step + 4 * UNIT * (weight.abs() + step) + 2.0**-140
        found[name] = radius.masked_fill(weight == 0, 0.0) if family.zeros == "fixed" else radius
    return found


def nearest(graph: Graph, params: Params, family: Family) -> Params:
    """The member that the quantiser makes: every weight rounded to nearest; float32."""
    found = dict(params)
    for node in graph.weighted():
        name = f"{node.name}.weight"
        codes, scale = quantize(params[name], family.bits)
        found[name] = dequantize(codes, scale)
    return found


def neighbours(graph: Graph, params: Params, family: Family) -> tuple[Params, Params]:
    """Every weight rounded down, and every weight rounded up; float32, by name, weights only.

    Any choice between the two is a member of the family of radius one; codes stay in the format's range.
    """
    down, up = {}, {}
    most = largest_code(family.bits)
    for name, (weight, scale) in _scales(graph, params, family).items():
        share = weight / scale.double()
        down[name] = share.floor().clamp(-most, most).float() * scale
        up[name] = share.ceil().clamp(-most, most).float() * scale
    return down, up


def ends(params: Params, radii: Params) -> tuple[Params, Params]:
    """The smallest and the largest float32 weights of the family, by name, weights only: a member's lie between."""
    low = {k: _inward(params[k], -r) for k, r in radii.items()}
    return low, {k: _inward(params[k], r) for k, r in radii.items()}


def _inward(weight: Tensor, offset: Tensor) -> Tensor:
    """``weight + offset`` rounded to float32 towards the weight."""
    single = (weight.double() + offset).float()
    beyond = (single.double() - weight.double()).abs() > offset.abs()
    return torch.where(beyond, torch.nextafter(single, weight.float()), single)


def outside(params: Params, member: Params, radii: Params) -> list[str]:
    """Names of the tensors in which ``member`` is not of the family around ``params``; empty for a member."""
    if params.keys() != member.keys():
        return sorted(params.keys() ^ member.keys())
    found = []
    for name, tensor in params.items():
        distance = (member[name].double() - tensor.double()).abs()
        limit = radii[name] if name in radii else torch.zeros_like(distance)
        if not bool((distance <= limit).all()):  # also for NaN
            found.append(name)
    return found


def _scales(graph: Graph, params: Params, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """Float64 weights and the float32 steps [out, 1, ...] of the quantiser, by the name of the tensor."""
    found = {}
    for node in graph.weighted():
        weight = params[f"{node.name}.weight"]
        _, scale = quantize(weight, family.bits)
        columns = scale.view(-1, *([1] * (weight.dim() - 1)))
        found[f"{node.name}.weight"] = weight.detach().double(), columns
    return found
