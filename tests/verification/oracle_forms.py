"""The exact answer to a disjunct of an unsafe set, by mixed-integer programming: see ``oracle``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from oracle import SECONDS, SLACK, Array, Program, _columns, _Encoding, evaluate
from scipy.optimize import Bounds, LinearConstraint, milp

LARGEST = 1e5
"""More than any form is away from 0."""


@dataclass(frozen=True)
class Excess:
    """``low <= min over the box of the largest entry of A y - b <= high``; ``high`` is attained at ``witness``."""

    low: float
    high: float
    witness: Array


def excess(program: Program, x: Array, rows: Array, bounds: Array) -> float:
    """The largest entry of ``A y - b`` at an input: the disjunct holds there where that is not above 0."""
    return float((rows @ evaluate(program, x) - bounds).max())


def smallest_excess(program: Program, lower: Array, upper: Array, rows: Array, bounds: Array) -> Excess:
    """The bracket for rows A [m, outputs] and numbers b [m], up to the solver's gap."""
    encoding = _Encoding(program, lower, upper)
    matrix = rows @ program.head[0] @ encoding.shape
    offset = rows @ (program.head[0] @ encoding.offset + program.head[1]) - bounds
    values, binaries = len(encoding.low), len(encoding.unstable)
    width = values + binaries + 1  # the last variable is above every form
    forms = np.zeros((len(rows), width))
    forms[:, :values], forms[:, -1] = matrix, -1.0
    constraints = [LinearConstraint(forms, -np.inf, -offset)]
    if (relus := encoding.constraints(exact=True)) != ():
        constraints.append(LinearConstraint(_columns(relus.A, width), relus.lb, relus.ub))
    for presolve in (True, False):
        solution = milp(
            np.eye(width)[-1],
            integrality=[0] * values + [1] * binaries + [0],
            bounds=Bounds([*encoding.low, *[0.0] * binaries, -LARGEST], [*encoding.high, *[1.0] * binaries, LARGEST]),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6, "time_limit": SECONDS, "presolve": presolve},
        )
        if solution.status == 0:
            break
    proof = solution.mip_dual_bound if binaries else solution.fun
    point = np.clip((lower + upper) / 2 if solution.x is None else solution.x[: program.inputs], lower, upper)
    return Excess(-np.inf if proof is None else float(proof) - SLACK, excess(program, point, rows, bounds), point)
