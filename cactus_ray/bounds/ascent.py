"""The search for slopes and multipliers of sub-problems, and the bounds that they give.

The search runs in float32 and decides nothing: every bound that is handed out is taken again in float64 with the best
slopes and multipliers found.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds import linear
from cactus_ray.bounds.graph import Params
from cactus_ray.bounds.splits import Problems, Region, Root

ALPHA_RATE, BETA_RATE, DECAY = 0.25, 0.1, 0.96
"""First step sizes of slopes and of multipliers, and the factor of each further step."""
PROBLEMS_AT_ONCE = 256
"""Problems that one search bounds together where the network is small; see ``batch_of``."""


@dataclass(frozen=True, slots=True)
class Search:
    """How slopes are searched: at most ``iterations`` bounds of each problem (>= 1: the first has the slopes given).

    A problem whose bound exceeds ``target`` leaves early. ``deadline``: value of ``time.perf_counter`` at which the
    search stops with the best so far.
    """

    iterations: int = 20
    target: float = 0.0
    alpha_rate: float = ALPHA_RATE
    beta_rate: float = BETA_RATE
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Lower bounds [B] (float64, real arithmetic) and the slopes and multipliers [B, U] (float32) that give them.

    ``points`` [B, *input_shape] (float64): where in the box the bounding linear form is smallest. ``free`` [B, U]: the
    ReLUs that can be split. ``coefficients`` [B, U]: what their outputs are multiplied by in the bounded form.
    """

    lower: Tensor
    alpha: Tensor
    beta: Tensor
    points: Tensor
    free: Tensor
    coefficients: Tensor


def search(region: Region, params: Params, alpha: Tensor, beta: Tensor, how: Search) -> tuple[Tensor, Tensor]:
    """The best slopes and multipliers [B, U] float32 that Adam finds from the given ones; deterministic.

    ``region`` is of float64, ``params`` the network's tensors of float32. Steps are projected, never clamped in the
    graph: a clamp's gradient is 0 at the ends, where slopes start.
    """
    with torch.enable_grad():
        single = region.single(params)
        least = single.slope_limits().expand(len(alpha), -1).gather(1, single.index)
        alpha, beta = torch.maximum(alpha, least).clamp(max=1.0), beta.clamp(min=0.0)
        state = _Ascent(single, alpha, beta, least)
        best_alpha, best_beta = alpha.clone(), beta.clone()
        best = torch.full_like(region.base.box.center.flatten(1)[:, 0], -torch.inf, dtype=torch.float32)
        active = torch.arange(len(best), device=best.device)
        for step in range(how.iterations):
            bound = state.bound()
            value = bound.detach()
            better = value > best[active]  # false for NaN
            improved = active[better]
            best[improved] = value[better]
            best_alpha[improved], best_beta[improved] = state.alpha.detach()[better], state.beta.detach()[better]
            # float32 and float64 differ in the last digits: what only just holds is improved further
            left = ~(value > how.target + 1e-4 * (1.0 + abs(how.target)))
            late = how.deadline is not None and time.perf_counter() >= how.deadline
            if step + 1 == how.iterations or late or not bool(left.any()):
                break
            state.ascend(bound, how.alpha_rate * DECAY**step, how.beta_rate * DECAY**step)
            if int(left.sum()) <= 0.75 * len(left):
                active = active[left]
                state.keep(left)
    return best_alpha, best_beta


class _Ascent:
    """Projected Adam on the sum of the bounds; problems do not influence each other."""

    def __init__(self, region: Region, alpha: Tensor, beta: Tensor, least: Tensor) -> None:
        self.region, self.least = region, least
        self.alpha, self.beta = alpha.clone().requires_grad_(), beta.clone().requires_grad_()
        self.moments = [torch.zeros_like(v) for v in (alpha, alpha, beta, beta)]
        self.steps = 0

    def bound(self) -> Tensor:
        return self.region.at(self.alpha, self.beta).lower_bounds(self.region.rows)[:, 0]

    def ascend(self, bound: Tensor, alpha_rate: float, beta_rate: float) -> None:
        gradients = torch.autograd.grad(bound.sum(), (self.alpha, self.beta), allow_unused=True, materialize_grads=True)
        self.steps += 1
        for i, (variable, gradient, rate) in enumerate(
            zip((self.alpha, self.beta), gradients, (alpha_rate, beta_rate), strict=True)
        ):
            mean, square = self.moments[2 * i], self.moments[2 * i + 1]
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
            variable.data.addcdiv_(mean, square.sqrt().add_(1e-12), value=rate * scale)
        self.alpha.data = torch.maximum(self.alpha.data, self.least).clamp_(max=1.0)
        self.beta.data.clamp_(min=0.0)

    def keep(self, which: Tensor) -> None:
        self.region, self.least = self.region.select(which), self.least[which]
        self.alpha = self.alpha.detach()[which].requires_grad_()
        self.beta = self.beta.detach()[which].requires_grad_()
        self.moments = [m[which] for m in self.moments]


def optimise(root: Root, problems: Problems, alpha: Tensor | None, beta: Tensor | None, how: Search) -> Found:
    """Search, then the float64 bounds. Without ``alpha`` it starts from CROWN's slopes, without ``beta`` from 0."""
    region = Region.of(root, problems)
    alpha = region.start().float() if alpha is None else alpha
    beta = torch.zeros_like(alpha) if beta is None else beta
    if problems.index.shape[1]:
        alpha, beta = search(region, root.single, alpha, beta, how)
    return decide(region, alpha, beta)


def decide(region: Region, alpha: Tensor, beta: Tensor) -> Found:
    """The float64 bounds with given slopes and multipliers (float32 [B, U]), and what branching reads off them."""
    seen: list[tuple[str, Tensor]] = []
    with torch.no_grad():
        relaxed = region.at(alpha.double(), beta.double(), seen)
        rows, constant = relaxed.input_rows(region.rows)
        lower = relaxed.smallest(rows, constant)
        shape = tuple(relaxed.box.center.shape[1:])
        points = relaxed.box.center - relaxed.box.radius * rows.dense(shape).coefficients[:, 0].sign()
        flat = torch.zeros_like(region.slopes)
        for name, coefficients in seen:
            first, end = region.neurons.span(name)
            flat[:, first:end] = coefficients[:, 0].flatten(1)
    return Found(lower[:, 0], alpha, beta, points, region.free, flat.gather(1, region.index))


def parts(count: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """0 .. count - 1 in parts of at most ``size``; none of them empty."""
    return tuple(torch.split(torch.arange(count, device=device), size)) if count else ()


def batch_of(root: Root) -> int:
    """How many problems are bounded at once: what the caches or the memory hold, as in ``linear.Relaxed.sweep``."""
    memory = linear.CPU_BYTES if root.low.device.type == "cpu" else linear.DEVICE_BYTES
    largest = 4 * max(root.neurons.size, 1)
    return max(8, min(PROBLEMS_AT_ONCE if root.low.device.type == "cpu" else 4096, 4 * memory // largest))
