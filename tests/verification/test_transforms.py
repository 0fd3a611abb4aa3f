"""Random transformations: what they draw, and how they are written."""

import pytest
import torch
from torch import Tensor

from cactus_ray.errors import ConfigError
from cactus_ray.verification import transforms
from cactus_ray.verification.transforms import KINDS, draw, parse_transforms

DOMAIN = (0.0, 1.0)


def image(height: int = 9, width: int = 9) -> Tensor:
    return torch.rand(2, height, width, generator=torch.Generator().manual_seed(1))


def drawn(text: str, start: Tensor, count: int = 200, seed: int = 0) -> Tensor:
    (transform,) = parse_transforms(text, "--transform")
    return draw(transform, start, count, torch.Generator().manual_seed(seed), DOMAIN)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (5, 12)])
def test_amount_zero_is_the_identity(name: str, shape: tuple[int, int]) -> None:
    start = image(*shape)
    torch.testing.assert_close(drawn(f"{name}:0", start, 3), start.expand(3, -1, -1, -1), atol=2e-6, rtol=0.0)


@pytest.mark.parametrize(
    "text", ["rotation:40", "brightness:.9", "contrast:1", "blur:2.5", "noise:1", "noise:1+blur:1"]
)
def test_draws_are_seeded_distinct_and_inside_the_domain(text: str) -> None:
    found = drawn(text, image())
    assert found.shape == (200, 2, 9, 9)
    assert found.dtype == torch.float32
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert torch.equal(found, drawn(text, image()))
    assert not torch.equal(found, drawn(text, image(), seed=1))
    assert len(found.flatten(1).unique(dim=0)) > 170  # few are clipped away, or too little blurred to see


def test_a_quarter_turn_is_exact_and_angles_stay_angles_on_other_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(degrees: float, start: Tensor) -> Tensor:
        monkeypatch.setattr(
            transforms, "_uniform", lambda n, *_: torch.full((n, 1, 1, 1), degrees, dtype=torch.float64)
        )
        return drawn("rotation:180", start, 1)[0]

    square, wide = image(), image(5, 12)
    torch.testing.assert_close(turned(90.0, square), square.rot90(1, (1, 2)), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(turned(180.0, wide), wide.flip(1, 2), atol=1e-5, rtol=0.0)
    inside = torch.zeros(1, 7, 13)
    inside[0, 3, 6 + 2] = 1.0  # two pixels right of the middle, and then two above it
    expected = torch.zeros(1, 7, 13)
    expected[0, 3 - 2, 6] = 1.0
    torch.testing.assert_close(turned(90.0, inside), expected, atol=1e-5, rtol=0.0)
    assert float(turned(45.0, torch.ones(1, 9, 9))[0, 0, 0]) < 0.1  # black comes in at the corners


def test_the_angle_is_uniform() -> None:
    far = torch.zeros(1, 33, 33)
    far[0, 16, 30:] = 1.0
    found = drawn("rotation:30", far, 2000)[:, 0]
    rows = torch.arange(33.0) - 16.0
    mass = found.sum((1, 2))
    angle = torch.rad2deg(torch.atan2(-(found.sum(2) * rows).sum(1) / mass, (found.sum(1) * rows).sum(1) / mass))
    assert 28.0 < float(angle.abs().max()) < 31.0
    quarters = torch.histc(angle, 4, -30.0, 30.0)
    assert float(quarters.min()) > 400


def test_brightness_adds_one_uniform_number() -> None:
    added = drawn("brightness:0.2", torch.full((2, 4, 4), 0.5), 4000) - 0.5
    assert float((added.amax((1, 2, 3)) - added.amin((1, 2, 3))).max()) < 1e-6
    assert 0.199 < float(added.max()) <= 0.2001
    assert -0.2001 <= float(added.min()) < -0.199
    assert abs(float(added.mean())) < 0.01


def test_contrast_scales_about_the_mean() -> None:
    start = 0.4 + 0.2 * image()
    found = drawn("contrast:0.5", start, 2000)
    torch.testing.assert_close(found.mean((1, 2, 3)), start.mean().expand(2000), atol=1e-5, rtol=0.0)
    factors = found.std((1, 2, 3)) / start.std()
    assert 0.5 <= float(factors.min()) < 0.51
    assert 1.49 < float(factors.max()) <= 1.501
    assert abs(float(factors.mean()) - 1.0) < 0.02


def test_blur_is_a_normalised_gaussian() -> None:
    assert float((drawn("blur:2", torch.full((1, 6, 6), 0.7), 50) - 0.7).abs().max()) < 1e-6
    point = torch.zeros(1, 25, 25)
    point[0, 12, 12] = 1.0
    found = drawn("blur:2", point, 500)[:, 0]
    assert float((found.sum((1, 2)) - 1.0).abs().max()) < 1e-5
    spread = (found.sum(1) * (torch.arange(25.0) - 12.0) ** 2).sum(1).sqrt()  # the standard deviation along one axis
    assert 1.8 < float(spread.max()) <= 2.001
    torch.testing.assert_close(found, found.transpose(1, 2))


def test_noise_has_the_stated_deviation_in_every_pixel() -> None:
    found = drawn("noise:0.1", torch.full((1, 8, 8), 0.5), 4000) - 0.5
    assert float((found.std(0) - 0.1).abs().max()) < 0.01
    assert float(found.mean(0).abs().max()) < 0.01


def test_steps_follow_each_other_and_texts_are_canonical() -> None:
    both = parse_transforms("rotation:15.0 + brightness:.25,noise:1e-1", "--transform")
    assert [str(t) for t in both] == ["rotation:15+brightness:0.25", "noise:0.1"]
    assert parse_transforms(",".join(map(str, both)), "--transform") == both
    assert "15" in both[0].words
    assert "0.25" in both[0].words
    ends = drawn("contrast:0+brightness:0.5", torch.full((1, 2, 2), 0.9))
    assert float(ends.max()) == 1.0  # clipped after each step


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spin:3", "'spin' is none of them"),
        ("rotation", "got ''"),
        ("rotation:x", "got 'x'"),
        ("rotation:-5", "got '-5'"),
        ("rotation:nan", "got 'nan'"),
        ("rotation:181", "number in [0, 180]; got '181'"),
        ("brightness:1.5", "number in [0, 1]; got '1.5'"),
        ("", "'' is none of them"),
        ("noise:0.1+", "'' is none of them"),
        ("noise:0.1,noise:.10", "noise:0.1 stands twice"),
    ],
)
def test_bad_texts_are_quoted(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_transforms(text, "--transform")
    assert str(error.value).startswith(f"--transform: got {text!r}; expected ")
    assert words in str(error.value)
