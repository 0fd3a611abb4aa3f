"""Lower slopes of ReLUs as variables of every form, and the gradient of its bound with respect to them.

Variables lie where the coefficients do (``rows.py``): a form that sees a patch of a map has those of the patch. The
gradients are written by hand and save what autograd would compute again. With A the coefficients of a form over a
ReLU's output, and the relaxed network evaluated where the form over the input is smallest, the gradient with respect
to a slope is ``max(A, 0) z``, z the value of the ReLU's input there (Xu et al. 2021, Sec. 3.2).

Nothing here decides anything: the deciding bounds are taken again in float64 with the slopes that are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params, slope_of
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Relaxed
from cactus_ray.bounds.relaxation import ReluRelaxation
from cactus_ray.bounds.rows import Rows, Shape
from cactus_ray.bounds.splits import cast

RATE, MOMENTUM = 0.5, 0.5
"""First step of a slope, and the share of the last gradients in the next direction. A slope moves by the sign of its
gradient: slopes of all neurons are numbers between 0 and 1, whatever their influence on the bound."""


def rates(iterations: int, first: float = RATE) -> list[float]:
    """The ``iterations - 1`` steps between as many bounds (>= 1): falling geometrically to about 1 / iterations."""
    return [first * iterations ** (-i / max(iterations - 1, 1)) for i in range(iterations - 1)]


def least_slope(slope: float) -> float:
    """The smallest sound lower slope of a (leaky) ReLU in float32, rounded up; the largest is 1."""
    number = torch.tensor(slope, dtype=torch.float32)
    return float(number if slope == 0 else torch.nextafter(number, torch.ones_like(number)))


@dataclass(slots=True)
class FreeRelu:
    """A ReLU whose lower slopes are variables of every form; float32 maps [B, *shape].

    ``start``: slopes to begin with; ``upper``, ``intercept``: the line above; ``free``: 1 where slopes may move, down
    to ``least``, else 0. ``multiplier`` [B, 1, *shape]: see ``splits.SplitRelu``. The first forms that are pulled give
    the variables ``alpha`` [B, S, ...] their layout; all further ones must have it, too.
    """

    start: Tensor
    upper: Tensor
    intercept: Tensor
    free: Tensor
    least: float
    multiplier: Tensor | None = None
    alpha: Tensor | None = None
    placed: tuple[Tensor, Tensor, Tensor] | None = None
    direction: Tensor | None = None

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """As ``ReluRelaxation.pull``."""
        if self.placed is None:
            start, upper, intercept, free = rows.overs(self.start, self.upper, self.intercept, self.free)
            self.placed = upper, intercept, free == 0
            if self.alpha is None:  # a slope for every form: what is shared among forms is spread
                spread = (start + torch.zeros_like(rows.coefficients)).clamp_(self.least, 1.0)
                self.alpha = spread.requires_grad_()
        assert self.alpha is not None
        pulled, constant = _Bend.apply(rows.coefficients, self.alpha, *self.placed)  # type: ignore[no-untyped-call]
        if self.multiplier is not None:
            pulled = pulled + self.multiplier
        return Rows(pulled, rows.origin), constant

    def select(self, samples: Tensor) -> FreeRelu:
        """The same for some samples, from their slopes as they are."""
        parts = (self.start, self.upper, self.intercept, self.free)
        start, upper, intercept, free = (part[samples] for part in parts)
        return FreeRelu(start, upper, intercept, free, self.least)

    def climb(self, gradient: Tensor, rate: float) -> None:
        """A step upward, then back into the slopes that are sound: a clamp in the graph has no gradient at its ends."""
        assert self.alpha is not None
        self.direction = gradient if self.direction is None else self.direction.mul_(MOMENTUM).add_(gradient)
        self.alpha.data.add_(self.direction.sign(), alpha=rate).clamp_(self.least, 1.0)


class _Bend(torch.autograd.Function):
    """``coefficients * (upper where negative, else alpha)``, and the sum of ``negative coefficients * intercept``.

    The gradient is right for sums of bounds, where that of every constant is 1.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, alpha: Tensor, upper: Tensor, intercept: Tensor, still: Tensor) -> Any:
        below = coefficients < 0
        slope, lift = torch.where(below, upper, alpha), torch.where(below, intercept, 0.0)
        ctx.save_for_backward(coefficients, slope, lift, below | still)
        return coefficients * slope, (coefficients * lift).flatten(2).sum(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        coefficients, slope, lift, still = ctx.saved_tensors
        own = (coefficients * gradient).masked_fill_(still, 0.0)
        return torch.addcmul(lift, slope, gradient), own, None, None, None


class _Corner(torch.autograd.Function):
    """The smallest value [B, S] of forms over a box; gradient as of ``_Bend``: the point where it is attained."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, lower: Tensor, upper: Tensor) -> Any:
        point = torch.where(coefficients > 0, lower, upper)
        ctx.save_for_backward(point)
        return (coefficients * point).flatten(2).sum(2)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors[0], None, None


@dataclass(slots=True)
class Climb:
    """Forms over a network with ``FreeRelu``s, in float32, on their way up."""

    relaxed: Relaxed
    rows: Rows
    corners: tuple[Tensor, Tensor] | None = None

    def bound(self) -> Tensor:
        """Lower bounds [B, S] with the slopes as they are."""
        rows, constant = self.relaxed.input_rows(self.rows)
        if self.corners is None:
            box = self.relaxed.box
            if self.relaxed.charges:
                box = Box(box.center, box.radius + self.relaxed.charges[self.relaxed.graph.nodes[0].name])
            lower, upper = rows.overs(box.lower, box.upper)
            self.corners = lower, upper
        bound: Tensor = constant + _Corner.apply(rows.coefficients, *self.corners)  # type: ignore[no-untyped-call]
        return bound

    def relus(self) -> dict[str, FreeRelu]:
        """The ReLUs that forms went through, by node."""
        found = {n: r for n, r in self.relaxed.relaxations.items() if isinstance(r, FreeRelu)}
        return {name: relu for name, relu in found.items() if relu.alpha is not None}


def own_slopes(relaxed: Relaxed, params: Params, rows: Rows, steps: int) -> dict[str, Tensor]:
    """Slopes [N, S, ...] of every form and ReLU before the network's last node, after some steps from CROWN's.

    ``relaxed``, ``rows``: as they will decide; ``params``: the network's tensors in float32.
    """
    with torch.enable_grad():
        climb = Climb(_free(relaxed, params), Rows(rows.coefficients.float(), rows.origin))
        for rate in rates(steps + 1):
            bound = climb.bound()
            relus = list(climb.relus().values())
            variables = [relu.alpha for relu in relus if relu.alpha is not None]
            gradients = torch.autograd.grad(bound.sum(), variables)
            for relu, gradient in zip(relus, gradients, strict=True):
                relu.climb(gradient, rate)
        return {name: relu.alpha.detach() for name, relu in climb.relus().items() if relu.alpha is not None}


def _free(relaxed: Relaxed, params: Params) -> Relaxed:
    """The network in float32 with free slopes; charged for weights within radii, but not for rounding alone."""
    single = cast(relaxed, params)
    found = dict(single.relaxations)
    for name, r in relaxed.relaxations.items():
        if isinstance(r, ReluRelaxation):
            least = least_slope(slope_of(relaxed.graph[name]))
            maps = r.lower_slope.float(), r.upper_slope.float(), r.intercept.float()
            found[name] = FreeRelu(*maps, (r.lower_slope != r.upper_slope).float(), least)
    # what rounding costs hardly depends on slopes
    return replace(single, relaxations=found, charges=single.charges if single.spreads else {})


@dataclass(frozen=True, slots=True)
class OwnSlopes(ReluRelaxation):
    """A ReLU's relaxation with lower slopes [B, S, ...] of every form, in the layout of its coefficients."""

    own: Tensor

    def placed(self, rows: Rows) -> tuple[Tensor, ...]:
        """As ``ReluRelaxation.placed``, with the forms' own slopes where the ReLU is not linear."""
        lower, upper, intercept = ReluRelaxation.placed(self, rows)
        return torch.where(lower != upper, self.own.to(lower.dtype), lower), upper, intercept

    def select(self, samples: Tensor) -> OwnSlopes:
        """The relaxation of some samples of the batch."""
        maps = self.lower_slope[samples], self.upper_slope[samples], self.intercept[samples]
        return OwnSlopes(*maps, self.own[samples])


def with_slopes(relaxed: Relaxed, own: Mapping[str, Tensor]) -> Relaxed:
    """The network with slopes of every form; sound where they are between ``least_slope`` and 1."""
    found = dict(relaxed.relaxations)
    for name, slopes in own.items():
        r = found[name]
        assert isinstance(r, ReluRelaxation)
        found[name] = OwnSlopes(r.lower_slope, r.upper_slope, r.intercept, slopes)
    return replace(relaxed, relaxations=found)
