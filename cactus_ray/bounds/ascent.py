"""The search for slopes and multipliers of sub-problems, and the bounds that they give.

The search runs in float32 and decides nothing: every bound that is handed out is taken again in float64 with the best
slopes and multipliers found.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cactus_ray.bounds import linear
from cactus_ray.bounds.graph import Params, slope_of
from cactus_ray.bounds.relaxation import Relaxation
from cactus_ray.bounds.rows import Rows
from cactus_ray.bounds.slopes import RATE, Climb, FreeRelu, least_slope, rates
from cactus_ray.bounds.splits import Problems, Region, Root

BETA_RATE, BETA_DECAY = 0.1, 0.96
"""First step size of multipliers, and the factor of each further step."""
MIX_RATE = 1.1
"""Steps of the weights of a mixture, in units of the length at which a linear bound would reach its target."""
BOX_STEPS = 4
"""Steps of the slopes that bound nodes inside the network, by layers of ReLUs before them: more gain little."""
PROBLEMS_AT_ONCE = 256
"""Problems that one search bounds together where the network is small; see ``batch_of``."""


@dataclass(frozen=True, slots=True)
class Search:
    """How slopes are searched: at most ``iterations`` bounds of each problem (>= 1: the first has the slopes given).

    A problem whose bound exceeds ``target`` leaves early. ``deadline``: value of ``time.perf_counter`` at which the
    search stops with the best so far. ``box_steps``: see ``alpha.tightened_boxes``; 0: boxes stay as CROWN gives them.
    """

    iterations: int = 20
    target: float = 0.0
    alpha_rate: float = RATE
    beta_rate: float = BETA_RATE
    deadline: float | None = None
    box_steps: int = BOX_STEPS


@dataclass(frozen=True, slots=True)
class Found:
    """Lower bounds [B] (float64, real arithmetic) and the slopes and multipliers [B, U] (float32) that give them.

    ``rows``: the forms [B, 1, ...] that are bounded. ``points`` [B, *input_shape] (float64): where in the box the
    bounding linear form is smallest. ``free`` [B, U]: the ReLUs that can be split. ``coefficients`` [B, U]: what their
    outputs are multiplied by in the bounded form.
    """

    lower: Tensor
    alpha: Tensor
    beta: Tensor
    rows: Rows
    points: Tensor
    free: Tensor
    coefficients: Tensor


def search(region: Region, params: Params, alpha: Tensor, beta: Tensor, how: Search) -> tuple[Tensor, Tensor, Rows]:
    """The best slopes and multipliers [B, U] float32 that are found from the given ones; deterministic.

    ``region`` is of float64, ``params`` the network's tensors of float32. The rows, float64, are the region's, or where
    those may be mixed the best mixtures that are found: weights >= 0 with the sum 1.
    """
    with torch.enable_grad():
        state = _Ascent(region, params, alpha, beta)
        best_slopes, best_beta = state.slopes.clone(), state.beta.detach().clone()
        best_rows = region.rows.coefficients.clone()
        best = torch.full_like(best_slopes[:, 0], -torch.inf)
        active = torch.arange(len(best), device=best.device)
        steps = rates(how.iterations, how.alpha_rate)
        for step in range(how.iterations):
            bound = state.bound()
            value = bound.detach()
            better = value > best[active]  # false for NaN
            improved = active[better]
            best[improved] = value[better]
            best_slopes[improved], best_beta[improved] = state.slopes[better], state.beta.detach()[better]
            if region.mixable is not None and step:  # else as they were given, in float64
                best_rows[improved] = state.climb.rows.coefficients.detach()[better].double()
            # float32 and float64 differ in the last digits: what only just holds is improved further
            enough = how.target + 1e-4 * (1.0 + abs(how.target))
            left = ~(value > enough)
            late = how.deadline is not None and time.perf_counter() >= how.deadline
            if step + 1 == how.iterations or late or not bool(left.any()):
                break
            state.ascend(bound, enough - value, steps[step], how.beta_rate * BETA_DECAY**step)
            if int(left.sum()) <= 0.75 * len(left):
                active = active[left]
                state.keep(left)
    beta = torch.zeros_like(beta)
    beta[:, state.columns] = best_beta
    if region.mixable is None:
        return best_slopes.gather(1, region.index), beta, region.rows
    return best_slopes.gather(1, region.index), beta, Rows(best_rows / best_rows.sum(2, keepdim=True))


class _Ascent:
    """Problems of one form each on their way up, in float32; they do not influence each other.

    ``slopes`` [B, F + 1]: of all ReLUs, shared with the relaxations. ``beta`` [B, K]: multipliers of the variables
    (``columns``) that are split in some problem.
    """

    def __init__(self, region: Region, params: Params, alpha: Tensor, beta: Tensor) -> None:
        single = region.single(params)
        least = [least_slope(slope_of(node)) for node, *_ in region.neurons.nodes]
        self.nodes = list(zip(region.neurons.nodes, least, strict=True))
        free = torch.zeros_like(single.slopes).scatter(1, region.index, region.free.float())
        self.slopes = single.slopes.scatter(1, region.index, torch.where(region.free, alpha, single.start()))
        self.columns = (region.sign != 0).any(0).nonzero()[:, 0]
        self.places, self.sign = region.index[:, self.columns], single.sign[:, self.columns]
        self.beta = beta[:, self.columns].clamp(min=0.0).requires_grad_()
        self.moments = [torch.zeros_like(self.beta), torch.zeros_like(self.beta)]
        self.steps = 0
        relus: dict[str, Relaxation] = {}
        for ((node, shape, first, end), low), (upper, intercept) in zip(self.nodes, single.upper, strict=True):
            self.slopes[:, first:end].clamp_(low, 1.0)
            start, loose = (flat[:, first:end].view(-1, *shape) for flat in (self.slopes, free))
            relus[node.name] = FreeRelu(start, upper, intercept, loose, low)
        base = replace(single.base, relaxations={**single.base.relaxations, **relus})
        self.mixable = region.mixable
        self.climb = Climb(base, self._movable(single.rows.coefficients))
        self._share({})

    def _movable(self, coefficients: Tensor) -> Rows:
        """Forms in the search: variables, if they may be mixed."""
        return Rows(coefficients.detach().requires_grad_(self.mixable is not None))

    def _share(self, directions: Mapping[str, Tensor]) -> None:
        """Let the relaxations read and move this object's slopes."""
        for (node, shape, first, end), _ in self.nodes:
            relu = self.climb.relaxed.relaxations[node.name]
            assert isinstance(relu, FreeRelu)
            relu.alpha = self.slopes[:, first:end].view(-1, 1, *shape).detach().requires_grad_()
            relu.direction = directions.get(node.name)

    def bound(self) -> Tensor:
        """The bounds [B] at the variables as they are."""
        if len(self.columns):
            pressed = Region.multiplier(self.sign, self.beta)
            flat = torch.zeros_like(self.slopes).scatter(1, self.places, pressed)
            ends = [end for (_, _, _, end), _ in self.nodes]
            parts = torch.tensor_split(flat, ends, dim=1)
            for ((node, shape, *_), _), part in zip(self.nodes, parts, strict=False):
                relu = self.climb.relaxed.relaxations[node.name]
                assert isinstance(relu, FreeRelu)
                relu.multiplier = part.reshape(-1, 1, *shape)
        return self.climb.bound()[:, 0]

    def ascend(self, bound: Tensor, missing: Tensor, alpha_rate: float, beta_rate: float) -> None:
        """Slopes go by the signs of their gradients, multipliers, which have no scale, by Adam.

        Weights of a mixture go by Polyak's steps: ``missing`` [B] is what bounds lack (Polyak 1969).
        """
        relus = self.climb.relus()
        variables = [relu.alpha for relu in relus.values() if relu.alpha is not None]
        variables += [self.climb.rows.coefficients] if self.mixable is not None else []
        *gradients, gradient = torch.autograd.grad(
            bound.sum(), [*variables, self.beta], allow_unused=True, materialize_grads=True
        )
        if self.mixable is not None:
            old = self.climb.rows.coefficients[:, 0]
            new = mixed(old, gradients.pop()[:, 0], self.mixable, missing)
            self.climb.rows = self._movable(new[:, None])
        for relu, slope in zip(relus.values(), gradients, strict=True):
            relu.climb(slope, alpha_rate)
        self.steps += 1
        mean, square = self.moments
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        self.beta.data.addcdiv_(mean, square.sqrt().add_(1e-12), value=beta_rate * scale).clamp_(min=0.0)

    def keep(self, which: Tensor) -> None:
        """Go on with some of the problems."""
        directions = {n: r.direction[which] for n, r in self.climb.relus().items() if r.direction is not None}
        self.mixable = None if self.mixable is None else self.mixable[which]
        rows = self._movable(self.climb.rows.coefficients[which])
        self.slopes, self.places, self.sign = self.slopes[which], self.places[which], self.sign[which]
        self.beta = self.beta.detach()[which].requires_grad_()
        self.moments = [m[which] for m in self.moments]
        self.climb = Climb(self.climb.relaxed.select(which), rows)
        self._share(directions)


def mixed(weights: Tensor, gradient: Tensor, mixable: Tensor, missing: Tensor) -> Tensor:
    """Weights [B, K] after a step upward, then back to those >= 0 with the sum 1 that are 0 unless ``mixable``.

    ``missing`` [B]: by how much a bound that is linear in them would rise, times MIX_RATE.
    """
    inside = gradient.masked_fill(~mixable, 0.0).nan_to_num(0.0)
    inside = (inside - inside.sum(1, keepdim=True) / mixable.sum(1, keepdim=True)) * mixable
    length = MIX_RATE * missing.clamp(min=0.0).nan_to_num(0.0) / inside.square().sum(1).clamp(min=1e-12)
    # a longer step leads to the same corner, and would lose the weights in its rounding
    length = torch.minimum(length, 100.0 / inside.abs().amax(1).clamp(min=1e-12))
    moved = (weights.detach() + length[:, None] * inside).masked_fill(~mixable, -torch.inf)
    falling = moved.sort(1, descending=True).values
    excess = falling.masked_fill(torch.isinf(falling), 0.0).cumsum(1) - 1
    count = torch.arange(1, moved.shape[1] + 1, device=moved.device)
    used = (falling * count > excess).sum(1, keepdim=True).clamp(min=1)
    return (moved - excess.gather(1, used - 1) / used).clamp(min=0.0)


def optimise(root: Root, problems: Problems, alpha: Tensor | None, beta: Tensor | None, how: Search) -> Found:
    """Search, then the float64 bounds. Without ``alpha`` it starts from CROWN's slopes, without ``beta`` from 0."""
    region = Region.of(root, problems)
    alpha = region.start().float() if alpha is None else alpha
    beta = torch.zeros_like(alpha) if beta is None else beta
    if problems.index.shape[1]:
        alpha, beta, rows = search(region, root.single, alpha, beta, how)
        region = replace(region, rows=rows)
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
    return Found(lower[:, 0], alpha, beta, region.rows, points, region.free, flat.gather(1, region.index))


def parts(count: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """0 .. count - 1 in parts of at most ``size``; none of them empty."""
    return tuple(torch.split(torch.arange(count, device=device), size)) if count else ()


def batch_of(root: Root) -> int:
    """How many problems are bounded at once: what the caches or the memory hold, as in ``linear.Relaxed.sweep``."""
    memory = linear.memory_of(root.low.device)
    largest = 4 * max(root.neurons.size, 1)
    return max(8, min(PROBLEMS_AT_ONCE if root.low.device.type == "cpu" else 4096, 4 * memory // largest))
