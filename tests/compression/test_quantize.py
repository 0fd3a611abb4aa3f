import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.compression.quantize import dequantize, largest_code, quantize, step


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


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        quantize(torch.ones(1, 1), bits)
