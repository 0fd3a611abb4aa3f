"""Exact smallest margin of a small ReLU network over a box, by mixed-integer linear programming (Tjeng et al. 2019).

Shares no code with the bound engines: its big-M constants are computed here, in numpy.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Array = NDArray[np.float64]
Layers = list[tuple[Array, Array]]
"""Weight [out, in] and bias [out] of each linear layer; ReLU between them."""


def evaluate(layers: Layers, x: Array) -> Array:
    """Logits of one input."""
    for weight, bias in layers[:-1]:
        x = np.maximum(weight @ x + bias, 0)
    return layers[-1][0] @ x + layers[-1][1]


def smallest_margin(layers: Layers, lower: Array, upper: Array, label: int) -> tuple[float, float, int]:
    """Bracket (low, high) on ``min over x and j of logit[label] - logit[j]``, and the number of unstable ReLUs."""
    columns = len(lower)
    bounds_low, bounds_high, integral = [*lower], [*upper], [0] * columns
    constraints: list[tuple[dict[int, float], float, float]] = []
    previous = list(range(columns))
    unstable = 0
    low, high = lower, upper
    for weight, bias in layers[:-1]:
        positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
        z_low = positive @ low + negative @ high + bias
        z_high = positive @ high + negative @ low + bias
        current = []
        for i in range(len(bias)):
            value = len(integral)
            current.append(value)
            integral.append(0)
            bounds_low.append(0.0)
            bounds_high.append(max(0.0, z_high[i]))
            linear = {p: -float(w) for p, w in zip(previous, weight[i], strict=True)} | {value: 1.0}
            if z_low[i] >= 0:
                constraints.append((linear, float(bias[i]), float(bias[i])))
            elif z_high[i] > 0:
                unstable += 1
                on = len(integral)
                integral.append(1)
                bounds_low.append(0.0)
                bounds_high.append(1.0)
                constraints.append((linear, float(bias[i]), np.inf))  # value >= z
                constraints.append((linear | {on: -float(z_low[i])}, -np.inf, float(bias[i] - z_low[i])))
                constraints.append(({value: 1.0, on: -float(z_high[i])}, -np.inf, 0.0))
        previous, low, high = current, np.maximum(z_low, 0), np.maximum(z_high, 0)
    matrix = np.zeros((len(constraints), len(integral)))
    for r, (terms, _, _) in enumerate(constraints):
        for column, factor in terms.items():
            matrix[r, column] = factor
    last_weight, last_bias = layers[-1]
    brackets = []
    for other in set(range(len(last_bias))) - {label}:
        goal = np.zeros(len(integral))
        goal[previous] = last_weight[label] - last_weight[other]
        solution = milp(
            goal,
            integrality=integral,
            bounds=Bounds(bounds_low, bounds_high),
            constraints=LinearConstraint(matrix, [c[1] for c in constraints], [c[2] for c in constraints]),
        )
        assert solution.status == 0, solution.message
        offset = float(last_bias[label] - last_bias[other])
        # the upper end is what the network really computes at the solver's input, so it holds whatever the solver did
        logits = evaluate(layers, np.clip(solution.x[:columns], lower, upper))
        proof = solution.fun if solution.mip_dual_bound is None else solution.mip_dual_bound  # None: a plain LP
        brackets.append((float(proof) + offset, float(logits[label] - logits[other])))
    return min(b[0] for b in brackets), min(b[1] for b in brackets), unstable
