import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.compression.quantize import (
    dequantize,
    float_step,
    largest_code,
    quantize,
    quantize_affine,
    step,
)


@given(
    bits=st.sampled_from([2, 3, 4, 6, 8]), scale=st.floats(-30, 30), seed=st.integers(0, 1000), conv=st.booleans()
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_error_is_at_most_half_a_step(bits: int, scale: float, seed: int, conv: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, 3, 2) if conv else (4, 18)
    weight = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**scale).float()
    codes, scales = quantize(weight, bits)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= largest_code(bits)
    error = (weight.double() - codes.double() * scales.double().view(-1, *[1] * (weight.dim() - 1))).abs()
    half = step(weight.double(), bits).view(-1, *[1] * (weight.dim() - 1)) / 2
    assert bool((error <= half * (1 + 1e-6)).all())  # the scale itself is rounded to float32
    assert torch.equal(scales, step(weight.double(), bits).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_zero_is_exact(bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-9, 1.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = quantize(weight, bits)
    tensor = dequantize(codes, scales)
    assert not tensor[:, :2].any()
    assert not tensor[1].any()
    assert bool((scales > 0).all())
    assert tensor[0, 3] == pytest.approx(1.0, rel=1e-6)


@given(exponent=st.floats(-30, 15), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_rounding_to_float_steps_is_the_cast(exponent: float, seed: int) -> None:
    weight = torch.randn(200, generator=torch.Generator().manual_seed(seed)).clamp(-1.9, 1.9) * 2.0**exponent
    weight[:3] = torch.tensor([0.0, 1.0, 1 + 2.0**-11]) * 2.0 ** round(exponent)  # zero, a power of two, a tie
    for kind, mantissa_bits, smallest in ((torch.float16, 10, -14), (torch.bfloat16, 7, -126)):
        size = float_step(weight, mantissa_bits, smallest)
        assert torch.equal(torch.round(weight / size) * size, weight.to(kind).float())


def test_half_goes_to_even_and_ends_are_reached() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -7.0]])
    codes, scales = quantize(weight, 4)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -7]]


def test_ternary_has_three_codes() -> None:
    codes, _ = quantize(torch.linspace(-1, 1, 21)[None], 2)
    assert sorted(set(codes.flatten().tolist())) == [-1, 0, 1]


def test_dequantize_rounds_once() -> None:
    scale = torch.tensor([0.1])
    codes = torch.arange(-127, 128, dtype=torch.int8)[None]
    exact = codes.double() * scale.double()
    assert torch.equal(dequantize(codes, scale), exact.float())


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]), scale=st.floats(-30, 30), shift=st.floats(-3, 3),
    seed=st.integers(0, 1000), per_tensor=st.booleans(), conv=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_affine_error_is_at_most_half_a_step_and_zero_is_exact(
    bits: int, scale: float, shift: float, seed: int, per_tensor: bool, conv: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, 3, 2) if conv else (4, 18)
    weight = ((torch.randn(shape, generator=generator, dtype=torch.float64) + shift) * 2.0**scale).float()
    weight[:, 0] = 0.0
    codes, scales, zero_points = quantize_affine(weight, bits, per_tensor=per_tensor)
    assert codes.dtype == zero_points.dtype == torch.uint8
    assert scales.shape == zero_points.shape == ((1,) if per_tensor else (4,))
    assert max(int(codes.max()), int(zero_points.max())) < 2**bits
    found = dequantize(codes, scales, zero_points, bits)
    assert not found[weight == 0].any()
    assert torch.equal(found == 0, codes == 0)
    half = scales.double().view(-1, *[1] * (weight.dim() - 1)) / 2
    assert bool(((found.double() - weight.double()).abs() <= half * (1 + 1e-4)).all())
    groups = weight.reshape(1, -1) if per_tensor else weight.flatten(1)
    width = groups.double().amax(1).clamp(min=0) - groups.double().amin(1).clamp(max=0)
    torch.testing.assert_close(scales.double(), width / (2**bits - 1), rtol=1e-6, atol=0)


def test_affine_by_hand() -> None:
    codes, scales, zero_points = quantize_affine(torch.tensor([[-1.0, 0.0, 1.0, 2.0], [1.0, 2.0, 3.0, 0.5]]), 2)
    assert scales.tolist() == [1.0, 1.0]
    assert zero_points.tolist() == [1, 0]
    assert codes.tolist() == [[3, 0, 1, 2], [1, 2, 3, 0]]  # (q - zero point) mod 4, and 0.5 rounds to even
    assert dequantize(codes, scales, zero_points, 2).tolist() == [[-1, 0, 1, 2], [1, 2, 3, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_rounding_twice_is_rounding_once(bits: int, per_tensor: bool, affine: bool) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(bits)) + 0.2

    def rounded(w: torch.Tensor) -> torch.Tensor:
        if affine:
            return dequantize(*quantize_affine(w, bits, per_tensor=per_tensor), bits)
        return dequantize(*quantize(w, bits, per_tensor=per_tensor))

    once = rounded(weight)
    torch.testing.assert_close(rounded(once), once, rtol=3e-7, atol=0)  # the scale may move by its last bit


def test_one_scale_per_tensor_is_that_of_its_largest_weight() -> None:
    weight = torch.tensor([[7.0, 1.0], [0.25, 0.5]])
    codes, scales = quantize(weight, 4, per_tensor=True)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[7, 1], [0, 0]]
    assert torch.equal(scales, step(weight, 4, per_tensor=True))


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        quantize(torch.ones(1, 1), bits)
    with pytest.raises(ValueError, match="2 to 8"):
        quantize_affine(torch.ones(1, 1), bits)
