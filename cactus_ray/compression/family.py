"""All roundings of a quantiser at once: networks whose weights lie within a radius of those of a centre.

The quantisers are those of ``quantize``: integers with a scale per output channel or per tensor, symmetric or with a
zero point, of weights of convolutions and linear layers only. Their scales are those of the *centre's* weights and stay
fixed: a quantiser with others (clipping, scales taken again after fine-tuning) makes networks of another family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.compression.levels import FORMATS, Level
from cactus_ray.compression.quantize import largest_code, quantize, quantize_affine
from cactus_ray.config import setting
from cactus_ray.errors import UserError


def _rounds(level: Level) -> bool:
    """Whether weights are rounded to whole steps, and nothing else is."""
    return level.bits is not None and not level.codebook and not level.integer_inference


RADII = {"half": 0.5, "one": 1.0}
ZEROS = ("fixed", "free")
INTEGERS = tuple(name for name in FORMATS if _rounds(Level(quantise=name)))
"""Formats of weights; w8a8 quantises activations, too, which no radius of a weight covers."""
UNIT = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Every network whose weights are within ``radius`` steps of the centre's, in real numbers or as float32.

    half: rounding to nearest with any rule for ties, and noise of half a step. one: also rounding down, up, towards
    zero, stochastic and learned rounding to either neighbour. ``zeros`` fixed: weights that are exactly 0 in the
    centre are 0 in every member. That is what these quantisers do, because 0 is a code, so that down, up and nearest
    are all 0; and a pruned network stays pruned. free: they vary as the others do.
    """

    format: str = setting(doc="format whose steps are meant", choices=INTEGERS)
    radius: str = setting("half", doc="radius in steps", choices=tuple(RADII))
    zeros: str = setting("free", doc="whether weights that are exactly 0 stay 0", choices=ZEROS)

    def __str__(self) -> str:
        return f"{self.format} +- {self.radius} step"

    @property
    def level(self) -> Level:
        """The level that rounds to nearest."""
        return Level(quantise=self.format)


def radii(graph: Graph, params: Params, family: Family) -> Params:
    """Radius of every weight of the centre ``params`` [*shape], float64, by the name of the tensor.

    ``radius`` steps, and what it costs that the step and the member's weight are float32 numbers. NaN or infinite
    weights have such radii. Raises UserError where activations are quantised: weights between codes have no kernel.
    """
    if has_quantisers(graph):
        raise UserError(f"--family {family.format}: this network computes with integers; expected float activations")
    found = {}
    for name, grid in _grids(graph, params, family).items():
        step = grid.scale.double().expand_as(grid.weight)
        radius = RADII[family.radius] * step + 4 * UNIT * (grid.weight.abs() + step) + 2.0**-140
        found[name] = radius.masked_fill(grid.weight == 0, 0.0) if family.zeros == "fixed" else radius
    return found


def nearest(graph: Graph, params: Params, family: Family) -> Params:
    """The member that the quantiser makes: every weight rounded to nearest, ties to even; float32."""
    grids = _grids(graph, params, family)
    return {**params, **{name: grid.at(torch.round(grid.steps)) for name, grid in grids.items()}}


def neighbours(graph: Graph, params: Params, family: Family) -> tuple[Params, Params]:
    """Every weight rounded down, and every weight rounded up; float32, by name, weights only.

    Any choice between the two is a member of the family of radius one; codes stay in the format's range.
    """
    grids = _grids(graph, params, family)
    down = {name: grid.at(grid.steps.floor()) for name, grid in grids.items()}
    return down, {name: grid.at(grid.steps.ceil()) for name, grid in grids.items()}


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


@dataclass(frozen=True, slots=True)
class _Grid:
    """Weights in float64, and the weights ``k * scale`` of a format, ``low <= k <= high``; all broadcast to them."""

    weight: Tensor
    scale: Tensor
    low: Tensor | int
    high: Tensor | int

    @property
    def steps(self) -> Tensor:
        return self.weight / self.scale.double()

    def at(self, steps: Tensor) -> Tensor:
        """Float32 weights at whole numbers of steps, as a runtime computes them from codes."""
        most, least = (torch.as_tensor(end, dtype=steps.dtype, device=steps.device) for end in (self.high, self.low))
        return torch.minimum(torch.maximum(steps, least), most).float() * self.scale


def _grids(graph: Graph, params: Params, family: Family) -> dict[str, _Grid]:
    """The grids of the family's quantiser, by the name of the tensor."""
    level, found = family.level, {}
    bits = level.bits
    assert bits is not None
    for node in graph.weighted():
        weight = params[f"{node.name}.weight"].detach()
        shape = -1, *([1] * (weight.dim() - 1))
        low: Tensor | int = -largest_code(bits)
        high: Tensor | int = largest_code(bits)
        if level.affine:
            _, scale, zero_point = quantize_affine(weight, bits, per_tensor=level.per_tensor)
            low = -zero_point.double().view(shape)
            high = low + 2**bits - 1
        else:
            _, scale = quantize(weight, bits, per_tensor=level.per_tensor)
        found[f"{node.name}.weight"] = _Grid(weight.double(), scale.view(shape), low, high)
    return found
