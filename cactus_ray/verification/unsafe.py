"""A case of a specification as tensors: a box of inputs, and linear forms over the outputs that say what is unsafe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import torch
from torch import Tensor

from cactus_ray.errors import UserError
from cactus_ray.verification.vnnlib import Case, Constraint, Disjunct


@dataclass(frozen=True, slots=True)
class Unsafe:
    """One case for a network of K outputs.

    lower, upper [*input]: float64, around the case's box (rounded outward). first, last [*input]: the smallest and
    largest float32 numbers inside it; where there is none, both are the nearest one, which the box then contains, too.
    rows [R, K], bounds [R]: forms A and numbers b, float64, b rounded up. members [D, m]: the rows of every disjunct,
    the first one repeated where a disjunct has fewer; a disjunct is unsafe where ``A y <= b`` in all of its rows.
    """

    lower: Tensor
    upper: Tensor
    first: Tensor
    last: Tensor
    rows: Tensor
    bounds: Tensor
    members: Tensor
    disjuncts: tuple[Disjunct, ...]

    @staticmethod
    def of(case: Case, outputs: int, order: Tensor, shape: tuple[int, ...]) -> Unsafe:
        """``order``, ``shape``: of the network's input, see ``OnnxNetwork``.

        Raises UserError for coefficients that float64 cannot hold.
        """
        lower = torch.tensor([_rounded(v, up=False) for v in case.lower], dtype=torch.float64)
        upper = torch.tensor([_rounded(v, up=True) for v in case.upper], dtype=torch.float64)
        first = torch.tensor([_single(v, up=True) for v in case.lower], dtype=torch.float32)
        last = torch.tensor([_single(v, up=False) for v in case.upper], dtype=torch.float32)
        nearest = torch.tensor([float(low) for low in case.lower], dtype=torch.float64).float()
        first, last = torch.where(first > last, nearest, first), torch.where(first > last, nearest, last)
        lower, upper = torch.minimum(lower, first.double()), torch.maximum(upper, last.double())
        unsafe = tuple(disjunct or (Constraint((), Fraction(0)),) for disjunct in case.unsafe)  # 0 <= 0 always holds
        constraints = tuple(dict.fromkeys(c for disjunct in unsafe for c in disjunct))
        place = {constraint: i for i, constraint in enumerate(constraints)}
        width = max(len(d) for d in unsafe)
        members = [[place[c] for c in d] + [place[d[0]]] * (width - len(d)) for d in unsafe]
        rows = torch.zeros(len(constraints), outputs, dtype=torch.float64)
        bounds = torch.zeros(len(constraints), dtype=torch.float64)
        for i, constraint in enumerate(constraints):
            bounds[i] = _fill(rows[i], constraint)
        low, high, least, greatest = (t[order].view(shape) for t in (lower, upper, first, last))
        return Unsafe(low, high, least, greatest, rows, bounds, torch.tensor(members), unsafe)

    def excess(self, outputs: Tensor) -> Tensor:
        """``A y - b`` [N, R] of outputs [N, K], in their precision."""
        return outputs @ self.rows.T.to(outputs) - self.bounds.to(outputs)

    def worst(self, excess: Tensor) -> Tensor:
        """By disjunct the largest excess of its rows [N, D]: it holds where that is not above 0."""
        return excess[:, self.members].amax(2)

    def holds(self, outputs: Tensor) -> bool:
        """Whether outputs [K] are unsafe, exactly."""
        values = outputs.tolist()
        return any(all(constraint.holds(values) for constraint in disjunct) for disjunct in self.disjuncts)

    @property
    def free(self) -> int:
        """Inputs that are not fixed."""
        return int((self.upper > self.lower).sum())


def _fill(row: Tensor, constraint: Constraint) -> float:
    """Writes the coefficients, multiplied to integers where needed; returns the bound, rounded up."""
    factor = Fraction(1)
    if any(Fraction(float(c)) != c for _, c in constraint.coefficients):
        factor = Fraction(lcm(*(c.denominator for _, c in constraint.coefficients)))
    for index, coefficient in constraint.coefficients:
        row[index] = float(factor * coefficient)
        if Fraction(float(factor * coefficient)) != factor * coefficient:
            raise UserError(f"the coefficient {coefficient} of Y_{index} has more digits than float64")
    return _rounded(factor * constraint.bound, up=True)


def _rounded(value: Fraction, *, up: bool) -> float:
    """The nearest float64 number on the given side."""
    try:
        found = float(value)
    except OverflowError:
        raise UserError("a number of the specification is beyond float64") from None
    if (Fraction(found) < value) if up else (Fraction(found) > value):
        found = math.nextafter(found, math.inf if up else -math.inf)
    return found


def _single(value: Fraction, *, up: bool) -> float:
    """The nearest float32 number on the given side."""
    found = np.float32(min(max(float(value), -3e38), 3e38))
    if (Fraction(float(found)) < value) if up else (Fraction(float(found)) > value):
        found = np.nextafter(found, np.float32(np.inf if up else -np.inf), dtype=np.float32)
    return float(found)
