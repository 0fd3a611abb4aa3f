"""Confidence bounds of flip probabilities: right as often as they say."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from cactus_ray.errors import ConfigError
from cactus_ray.parsing import parse
from cactus_ray.verification.semantic import (
    SampleFlips,
    SemanticSettings,
    chernoff_estimate,
    count_flips,
    flip_bound,
    least_draws,
    summary,
)
from cactus_ray.verification.transforms import Transform, parse_transforms

(BRIGHTNESS,) = parse_transforms("brightness:0.2", "--transform")
GREY = torch.full((1, 2, 2), 0.5)


def thresholded(flip: float):  # type: ignore[no-untyped-def]
    """A classifier of grey images that brightness:0.2 turns to class 1 with exactly this probability."""
    limit = 0.5 + 0.2 * (1.0 - 2.0 * flip)

    def logits(images: Tensor) -> Tensor:
        over = images.mean((1, 2, 3)) - limit
        return torch.stack([-over, over], 1)

    return logits


def settings(draws: int, seed: int = 0, confidence: float = 0.9, flip: float = 0.1) -> SemanticSettings:
    return SemanticSettings(draws=draws, seed=seed, confidence=confidence, flip=flip)


@pytest.mark.parametrize("risk", [0.1, 0.01, 1e-5])
@pytest.mark.parametrize("draws", [1, 7, 60, 1000])
def test_the_bound_is_right_with_its_confidence_at_every_probability(draws: int, risk: float) -> None:
    bounds = [flip_bound(k, draws, risk) for k in range(draws + 1)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == 1.0
    for p in (1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999, *(b * (1 + 1e-6) for b in bounds[:20] if b < 0.99)):
        too_low = sum(b < p for b in bounds)  # the bounds of 0 ... too_low - 1 flips
        wrong = stats.binom.cdf(too_low - 1, draws, p) if too_low else 0.0
        assert wrong <= risk * (1 + 1e-6)
    for k in range(0, draws, max(1, draws // 7)):  # and it is not larger than it must be
        assert stats.binom.cdf(k, draws, bounds[k]) == pytest.approx(risk, rel=1e-2)


def test_known_values() -> None:
    assert flip_bound(0, 4603, 0.01) == pytest.approx(1 - 0.01 ** (1 / 4603), rel=1e-8)
    assert flip_bound(0, 4603, 0.01) <= 0.001 < flip_bound(0, 4602, 0.01)
    assert least_draws(0.001, 0.01) == 4603
    for flip, risk in ((0.5, 0.1), (0.2, 1e-9), (1e-4, 1e-4), (0.999, 0.5)):
        n = least_draws(flip, risk)
        assert flip_bound(0, n, risk) <= flip
        assert n == 1 or flip_bound(0, n - 1, risk) > flip * (1 - 1e-8)


@pytest.mark.parametrize(("flips", "draws", "risk"), [(0, 0, 0.1), (-1, 5, 0.1), (6, 5, 0.1), (0, 5, 0.0), (0, 5, 1.0)])
def test_impossible_counts_are_refused(flips: int, draws: int, risk: float) -> None:
    with pytest.raises(ValueError, match="flip_bound"):
        flip_bound(flips, draws, risk)


@pytest.mark.parametrize(("key", "value"), [("draws", 0), ("confidence", 1.0), ("flip", 0.0), ("seed", -1)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got {value!r}"):
        parse(SemanticSettings, {"draws": 10, key: value})


@pytest.mark.parametrize("flip", [0.02, 0.2])
def test_the_bound_covers_a_known_flip_probability(flip: float) -> None:
    runs, draws, risk = 300, 150, 0.1
    logits = thresholded(flip)
    counted = [count_flips(logits, GREY, 0, 0, BRIGHTNESS, settings(draws, seed)) for seed in range(runs)]
    covered = sum(flip_bound(row.semantic_flips, draws, risk) >= flip for row in counted)
    assert covered >= stats.binom.ppf(1e-4, runs, 1 - risk)
    mean = sum(row.semantic_flips for row in counted) / (runs * draws)
    assert abs(mean - flip) < 4 * math.sqrt(flip * (1 - flip) / (runs * draws))


def test_samples_have_draws_of_their_own_and_counts_repeat() -> None:
    logits = thresholded(0.3)
    first = [count_flips(logits, GREY, 0, index, BRIGHTNESS, settings(1200)) for index in range(6)]
    again = [count_flips(logits, GREY, 0, index, BRIGHTNESS, settings(1200)) for index in (4, 2)]
    assert again == [first[4], first[2]]
    assert len({row.semantic_flips for row in first}) > 1
    assert all(row.semantic_draws == 1200 for row in first)


def test_what_is_misclassified_is_counted_as_such_and_nothing_is_drawn() -> None:
    row = count_flips(thresholded(0.3), GREY, 1, 7, BRIGHTNESS, settings(50))
    assert row == SampleFlips(7, 1, False, 0, 0, None)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_flips(bad: float) -> None:
    def broken(images: Tensor) -> Tensor:
        logits = torch.tensor([[2.0, 0.0]]).repeat(len(images), 1)
        logits[(images - GREY).abs().amax((1, 2, 3)) > 0, 0] = bad
        return logits

    row = count_flips(broken, GREY, 0, 0, BRIGHTNESS, settings(700))
    assert (row.semantic_correct, row.semantic_flips, row.semantic_chernoff) == (True, 700, 1.0)
    always = count_flips(lambda images: torch.full((len(images), 2), bad), GREY, 0, 0, BRIGHTNESS, settings(50))
    assert not always.semantic_correct


def test_a_tie_is_a_flip() -> None:
    row = count_flips(lambda images: torch.stack([images[:, 0, 0, 0] != 0.5, images[:, 0, 0, 0] == 0.5], 1).float(),
                      GREY, 1, 0, Transform((("brightness", 0.2),)), settings(40))  # fmt: skip
    assert row.semantic_flips == 40
    tied = count_flips(lambda images: torch.ones(len(images), 3), GREY, 0, 0, BRIGHTNESS, settings(40))
    assert not tied.semantic_correct


def test_the_chernoff_value_by_hand() -> None:
    quiet = torch.full((50,), 0.1)
    assert chernoff_estimate(quiet, 0.1001) == pytest.approx(math.exp(-1e4 * 0.0001), rel=1e-2)
    assert chernoff_estimate(quiet, 0.1) == pytest.approx(1.0)
    assert chernoff_estimate(quiet, 0.05) == 1.0
    assert chernoff_estimate(torch.full((50,), torch.nan), 0.4) == 1.0
    mixed = torch.tensor([0.0] * 45 + [0.2] * 5)  # the last group holds all that moves
    values = [(math.exp(-t * 0.3) + math.exp(-t * 0.1)) / 2 for t in (10 ** (i / 10) for i in range(41))]
    assert chernoff_estimate(mixed, 0.3) == pytest.approx(min(values), rel=1e-9)


def test_the_chernoff_value_may_lie_below_the_truth() -> None:
    """Why it decides nothing: what no draw has shown, it does not know."""
    flip = 0.02
    wrong = 0
    for seed in range(100):
        row = count_flips(
            lambda images: torch.where(images.mean((1, 2, 3))[:, None] > 0.5 + 0.2 * (1 - 2 * flip), -9.0, 9.0)
            * torch.tensor([1.0, -1.0]),
            GREY, 0, 0, BRIGHTNESS, settings(50, seed),
        )  # fmt: skip
        assert row.semantic_chernoff is not None
        wrong += row.semantic_chernoff < flip
    assert wrong > 10


def test_a_claim_about_all_samples_pays_for_their_number() -> None:
    rows = [SampleFlips(i, 0, True, 60, 0, 0.01) for i in range(8)]
    rows += [SampleFlips(8, 0, True, 60, 30, 1.0), SampleFlips(9, 0, False, 0, 0, None)]
    found = summary(rows, settings(60, confidence=0.9, flip=0.05))
    assert flip_bound(0, 60, 0.1) < 0.05 < flip_bound(0, 60, 0.1 / 9)
    assert (found["semantic_n_hold"], found["semantic_n_hold_jointly"]) == (8, 0)
    assert (found["semantic_n_open"], found["semantic_n_misclassified"], found["semantic_n_chernoff"]) == (1, 1, 8)
    assert found["semantic_hold_share"] == 0.8
    assert all(key.startswith("semantic_") for key in found)
    assert summary(rows, settings(60, confidence=0.9, flip=0.08))["semantic_n_hold_jointly"] == 8
    with pytest.raises(ValueError, match="no samples"):
        summary([], settings(1))
