"""Families of networks around a centre: which weights they hold, and which not."""

import pytest
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.compression.family import Family, ends, nearest, neighbours, outside, radii
from cactus_ray.compression.quantize import dequantize, quantize, quantize_affine, step
from cactus_ray.config import parse
from cactus_ray.errors import ConfigError, UserError

GRAPH = Graph((Node("input", "input"), Node("fc", "linear", ("input",)), Node("conv", "conv2d", ("fc",))), (4,))
FORMATS = ("int8", "int6", "int4", "ternary", "int4:tensor", "int8:affine", "int4:affine", "int2:tensor:affine")


def params_of(seed: int, zeros: float = 0.3) -> Params:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 40, generator=generator) * torch.logspace(-6, 2, 6)[:, None]
    weight = weight * (torch.rand(6, 40, generator=generator) > zeros)
    weight[3] = 0.0
    kernel = torch.randn(5, 3, 2, 2, generator=generator)
    return {"fc.weight": weight, "fc.bias": torch.randn(6, generator=generator), "conv.weight": kernel}


def quantised(weight: Tensor, family: Family) -> Tensor:
    """What a file of the family's level holds."""
    level = family.level
    assert level.bits is not None
    if level.affine:
        codes, scale, zero_point = quantize_affine(weight, level.bits, per_tensor=level.per_tensor)
        return dequantize(codes, scale, zero_point, level.bits)
    return dequantize(*quantize(weight, level.bits, per_tensor=level.per_tensor))


def mixed(low: Params, high: Params, params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        **params,
        **{k: torch.where(torch.rand(v.shape, generator=generator) < 0.5, v, high[k]) for k, v in low.items()},
    }


@pytest.mark.parametrize("zeros", ["free", "fixed"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rounding_is_a_member(seed: int, name: str, zeros: str) -> None:
    params = params_of(seed)
    half, one = (Family(format=name, radius=r, zeros=zeros) for r in ("half", "one"))
    rounded, (down, up) = nearest(GRAPH, params, half), neighbours(GRAPH, params, one)
    assert outside(params, rounded, radii(GRAPH, params, half)) == []
    for member in ({**params, **down}, {**params, **up}, mixed(down, up, params, seed)):
        assert outside(params, member, radii(GRAPH, params, one)) == []
    assert torch.equal(rounded["fc.weight"], quantised(params["fc.weight"], half))
    assert torch.equal(rounded["fc.bias"], params["fc.bias"])
    # towards zero and to the nearer neighbour are choices between the two
    assert bool(((rounded["fc.weight"] == down["fc.weight"]) | (rounded["fc.weight"] == up["fc.weight"])).all())


@pytest.mark.parametrize("name", FORMATS)
def test_other_roundings_are_not_members_of_half_a_step(name: str) -> None:
    params = params_of(2)
    half = radii(GRAPH, params, Family(format=name))
    down, up = neighbours(GRAPH, params, Family(format=name, radius="one"))
    for member in (down, up):
        assert outside(params, {**params, **member}, half) == ["fc.weight", "conv.weight"]


def test_radii_are_steps_of_the_centre_and_little_more() -> None:
    params = params_of(0)
    for radius, share in (("half", 0.5), ("one", 1.0)):
        found = radii(GRAPH, params, Family(format="int6", radius=radius))
        for name, weight in ((k, v) for k, v in params.items() if k != "fc.bias"):
            columns = step(weight.double(), 6).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
            assert bool((found[name] > share * columns).all())
            more = found[name] - share * columns
            assert bool((more <= 1e-6 * (weight.abs() + columns)).all())


def test_half_of_a_radius_is_too_little() -> None:
    """The planted fault of the tests above."""
    params = params_of(0)
    half = {k: r / 2 for k, r in radii(GRAPH, params, Family(format="int8")).items()}
    assert outside(params, nearest(GRAPH, params, Family(format="int8")), half) == ["fc.weight", "conv.weight"]


def test_fixed_zeros_stay_zero_under_every_rounding() -> None:
    params = params_of(0)
    zero = params["fc.weight"] == 0
    fixed, free = (radii(GRAPH, params, Family(format="int4", radius="one", zeros=z)) for z in ("fixed", "free"))
    assert bool((fixed["fc.weight"][zero] == 0).all())
    assert bool((free["fc.weight"] > 0).all())
    assert torch.equal(fixed["fc.weight"][~zero], free["fc.weight"][~zero])
    down, up = neighbours(GRAPH, params, Family(format="int4", radius="one"))
    for member in (down, up, nearest(GRAPH, params, Family(format="int4"))):
        assert bool((member["fc.weight"][zero] == 0).all())


def test_ends_are_members_and_the_next_numbers_are_not() -> None:
    params = params_of(0)
    wide = radii(GRAPH, params, Family(format="int8", zeros="fixed"))
    for side, weights in zip((-torch.inf, torch.inf), ends(params, wide), strict=True):
        assert weights.keys() == wide.keys()
        assert outside(params, {**params, **weights}, wide) == []
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            beyond = torch.nextafter(weight, torch.full_like(weight, side))
            assert bool(((beyond.double() - params[name].double()).abs() > wide[name]).all())


def test_what_is_no_member_is_named() -> None:
    params = params_of(0)
    wide = radii(GRAPH, params, Family(format="int8"))
    assert outside(params, params, wide) == []
    assert outside(params, {**params, "fc.bias": params["fc.bias"] + 1e-6}, wide) == ["fc.bias"]
    broken: Tensor = params["conv.weight"].clone()
    broken[0, 0, 0, 0] = torch.nan
    assert outside(params, {**params, "conv.weight": broken}, wide) == ["conv.weight"]
    assert outside(params, {"fc.bias": params["fc.bias"]}, wide) == ["conv.weight", "fc.weight"]


def test_quantised_activations_are_no_part_of_a_family() -> None:
    codes = Node("codes", "quantize", ("fc",), {"scale": 0.1, "zero_point": 0, "low": -128, "high": 127})
    params = {k: v for k, v in params_of(0).items() if k.startswith("fc")}
    with pytest.raises(UserError, match="float activations"):
        radii(Graph((*GRAPH.nodes[:2], codes), (4,)), params, Family(format="int8"))
    with pytest.raises(ConfigError):
        parse(Family, {"format": "w8a8"})


def test_a_family_is_read_strictly() -> None:
    assert str(parse(Family, {"format": "int8", "radius": "one", "zeros": "fixed"})) == "int8 +- one step"
    for wrong in ({"format": "fp16"}, {"format": "int8", "radius": "two"}, {"format": "int8", "zeros": "no"}, {}):
        with pytest.raises(ConfigError):
            parse(Family, wrong)
