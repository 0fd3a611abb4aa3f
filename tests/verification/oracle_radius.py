"""The exact robust radius of an image: the largest ball in which the oracle proves the label."""

from __future__ import annotations

import numpy as np
from oracle import Array, Program, box, margin, smallest_margin


def _descend(program: Program, start: Array, lower: Array, upper: Array, label: int, steps: int) -> float:
    """Smallest margin that signed gradient steps find: no proof, a start for the search of the radius."""
    x, best = start, np.inf
    for step in range(steps):
        v, active = x, []
        for matrix, offset in program.layers:
            z = matrix @ v + offset
            active.append(z > 0)
            v = np.append(v, np.maximum(z, 0))
        logits = program.head[0] @ v + program.head[1]
        logits[label], mine = -np.inf, logits[label]
        other = int(logits.argmax())
        best = min(best, float(mine - logits[other]))
        gradient = program.head[0][label] - program.head[0][other]
        for (matrix, _), on in zip(reversed(program.layers), reversed(active), strict=True):
            gradient = gradient[: matrix.shape[1]] + (gradient[matrix.shape[1] :] * on) @ matrix
        x = np.clip(x - (upper - lower) * (0.5 - 0.5 * step / steps) * np.sign(gradient), lower, upper)
    return best


def attacked_radius(program: Program, image: Array, label: int, largest: float = 0.5) -> float | None:
    """A radius at which a gradient attack succeeds, by bisection to 2 %; None where ``largest`` is not enough."""

    def falls(epsilon: float) -> bool:
        lower, upper = box(image, epsilon)
        starts = image, lower + 0.25 * (upper - lower), upper - 0.25 * (upper - lower)
        return any(_descend(program, np.clip(s, lower, upper), lower, upper, label, 15) < 0 for s in starts)

    if not falls(largest):
        return None
    low, high = 0.0, largest
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if falls(middle) else (middle, high)
    return high


def robust_radius(
    program: Program, image: Array, label: int, start: float, tolerance: float = 0.03
) -> tuple[float, float] | None:
    """Bracket [safe, falls] of the exact robust radius of a rightly classified image, ``falls <= safe / (1 - tol)``.

    None where the oracle cannot tell in its time.

    Safe: the oracle proves a margin of at least 0. Falls: an input at that distance has a margin below 0. ``start``: a
    guess from above; each exact witness pulls the upper end down to where its line from the image crosses, bisection
    takes over where that is slow.
    """
    safe, falls = 0.0, np.inf
    probe = start
    while safe < (1 - tolerance) * falls:
        found = smallest_margin(program, *box(image, probe), label)
        if found.high >= 0 > found.low + 1e-3:
            return None
        if found.high >= 0:
            safe = probe
        else:
            falls = probe * _crossing(program, image, found.witness, label)
        if not np.isfinite(falls):
            probe = 1.1 * safe
        else:
            probe = max((1 - 0.9 * tolerance) * falls, (safe + falls) / 2 if safe else 0.0)
    return safe, falls


def _crossing(program: Program, image: Array, witness: Array, label: int) -> float:
    """Share of the way from the image to a counterexample at which the margin is still below 0, to 0.1 %."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        falls = margin(program, image + middle * (witness - image), label) < 0
        low, high = (low, middle) if falls else (middle, high)
    return high
