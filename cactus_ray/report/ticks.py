"""Round values on an axis, and how values are written: for the figures whose axes Plotly does not label well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cactus_ray.report.figures import size_text

TICKS = 6  # about as many on an axis


def is_share(metric: str) -> bool:
    """Whether values of a metric are fractions that are read as per cent."""
    return "accuracy" in metric


def metric_text(metric: str, value: float) -> str:
    """A value of a metric as tables show it: ``86.3%``, ``16,064`` or ``0.1234``."""
    if is_share(metric):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def tick_text(value: float, *, share: bool = False) -> str:
    """A round value as an axis shows it: ``0.05``, ``20k`` or, where ``share``, ``85%``."""
    value = 0.0 if abs(value) < 1e-12 else value
    if share:
        return f"{100 * value:.4g}%"
    return size_text(value).replace(" ", "") if value >= 10_000 else f"{value:.4g}"


def tick_values(low: float, high: float, *, log: bool = False, whole: bool = False) -> list[float]:
    """Round values from ``low`` to ``high``, in order, about ``TICKS`` at most; one where both ends are the same.
    ``log``: for a logarithmic axis (``low`` > 0); ``whole``: integers only."""
    if high <= low:
        return [low]
    # A logarithmic axis of less than a decade may hold but one round power.
    powers = _powers(low, high) if log else []
    return powers if len(powers) > 1 else _multiples(low, high, whole)


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten; only the powers, or every second or third, where those are too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    patterns: list[tuple[Sequence[int], int]] = [((1, 2, 5), 1), ((1, 3), 1)]
    for digits, every in patterns + [((1,), n) for n in range(1, len(decades) + 1)]:
        values = [d * 10.0**k for k in decades if k % every == 0 for d in digits]
        found = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= TICKS + 1:
            break
    return found


def _multiples(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(d * power for d in (1, 2, 5, 10) if (high - low) / (d * power) <= TICKS or d == 10)
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
