import pytest

from cactus_ray.config import TrainConfig
from cactus_ray.training.schedule import crown_weight_at, epsilon_at, learning_rate_at, ramp_at, standard_weight_at

TRAIN = TrainConfig(warmup=0.1, ramp=0.4)


def test_end_values() -> None:
    assert epsilon_at(0.0, TRAIN, 0.3) == 0.0
    assert epsilon_at(0.0999, TRAIN, 0.3) == 0.0
    assert epsilon_at(0.5, TRAIN, 0.3) == pytest.approx(0.3)
    assert epsilon_at(1.0, TRAIN, 0.3) == 0.3  # exactly: latent attacks begin where the end is reached
    assert epsilon_at(0.50001, TRAIN, 0.3) == 0.3
    assert standard_weight_at(0.05, TRAIN, 0.2) == 1.0
    assert standard_weight_at(0.3, TRAIN, 0.2) == pytest.approx(0.6)
    assert standard_weight_at(0.7, TRAIN, 0.2) == pytest.approx(0.2)


def test_epsilon_curve_meets_its_line_with_the_same_slope() -> None:
    bend, h = 0.1 + 0.25 * 0.4, 1e-5
    left = (epsilon_at(bend, TRAIN, 1.0) - epsilon_at(bend - h, TRAIN, 1.0)) / h
    right = (epsilon_at(bend + h, TRAIN, 1.0) - epsilon_at(bend, TRAIN, 1.0)) / h
    assert left == pytest.approx(right, rel=1e-3)
    middle = (epsilon_at(0.5 - 1e-9, TRAIN, 1.0) - epsilon_at(0.3, TRAIN, 1.0)) / 0.2
    assert middle == pytest.approx(right, rel=1e-3)  # the rest is one line


def test_epsilon_never_falls_or_exceeds() -> None:
    values = [epsilon_at(i / 500, TRAIN, 0.3) for i in range(501)]
    assert values == sorted(values)
    assert max(values) <= 0.3


def test_without_warmup_and_ramp_the_final_values_hold_from_the_start() -> None:
    train = TrainConfig(warmup=0.0, ramp=0.0)
    assert (ramp_at(0.0, train), epsilon_at(0.0, train, 0.1), standard_weight_at(0.0, train, 0.0)) == (1.0, 0.1, 0.0)


def test_learning_rate_falls_at_each_fraction() -> None:
    train = TrainConfig(decay_at=(0.5, 0.8), decay_factor=0.1)
    assert [learning_rate_at(f, train, 1.0) for f in (0.0, 0.5, 0.9)] == pytest.approx([1.0, 0.1, 0.01])


def test_weight_of_crown_is_a_line_in_epsilon() -> None:
    assert [crown_weight_at(e, 0.2, 0.5) for e in (0.0, 0.1, 0.2)] == pytest.approx([1.0, 0.75, 0.5])
    assert crown_weight_at(0.0, 0.0, 0.5) == 0.5  # without a threat there is no ramp


def test_the_ramp_ends_where_it_says_whatever_is_rounded() -> None:
    for percent in range(100):
        train = TrainConfig(warmup=percent / 100, ramp=1 - percent / 100)
        assert ramp_at(1.0, train) == 1.0
        assert epsilon_at(1.0, train, 0.1) == 0.1
