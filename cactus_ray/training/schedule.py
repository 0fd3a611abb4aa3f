"""What changes during a run, as pure functions of the fraction of all steps that are done (0 <= fraction <= 1)."""

from __future__ import annotations

from cactus_ray.config import TrainConfig

_BEND = 0.25  # share of the ramp that is curved
_POWER = 4


def ramp_at(fraction: float, train: TrainConfig) -> float:
    """Progress of the ramp in [0, 1]: 0 during the warm-up, 1 after it.

    Linear in time, unlike ``epsilon_at``. Without a ramp it jumps at the end of the warm-up.
    """
    if fraction < train.warmup:
        return 0.0
    if fraction >= train.warmup + train.ramp - 1e-9:  # what waits for the end must not miss it by a rounding
        return 1.0
    return (fraction - train.warmup) / train.ramp


def epsilon_at(fraction: float, train: TrainConfig, epsilon: float) -> float:
    """Training radius: 0, then a curve of power 4 over a quarter of the ramp that goes on as a line to ``epsilon``.

    Both pieces and their slopes meet (Shi et al. 2021, Sec. 4.1, and its "smoothed" schedule).
    """
    t = ramp_at(fraction, train)
    height = 1.0 / ((1.0 - _BEND) * _POWER * _BEND ** (_POWER - 1) + _BEND**_POWER)
    if t < _BEND:
        return epsilon * height * t**_POWER
    return epsilon * min(1.0, height * (_BEND**_POWER + (t - _BEND) * _POWER * _BEND ** (_POWER - 1)))


def standard_weight_at(fraction: float, train: TrainConfig, final: float) -> float:
    """Weight of the standard loss: 1 during the warm-up, then a line to ``final`` (lambda of CACTUS, Eq. 7)."""
    t = ramp_at(fraction, train)
    return 1.0 + (final - 1.0) * t


def crown_weight_at(epsilon: float, largest: float, final: float) -> float:
    """Weight of CROWN-IBP beside IBP: 1 at epsilon 0, then a line in epsilon to ``final`` at ``largest``.

    Beta of Zhang et al. 2020, which falls as epsilon rises.
    """
    return 1.0 + (final - 1.0) * (epsilon / largest if largest > 0 else 1.0)


def learning_rate_at(fraction: float, train: TrainConfig, initial: float) -> float:
    """Learning rate: ``initial`` times ``decay_factor`` for each fraction of ``decay_at`` that is passed."""
    return float(initial * train.decay_factor ** sum(fraction >= at for at in train.decay_at))
