"""Sub-problems whose ReLUs are all split are linear programs; their multipliers are found to high accuracy.

Restarted primal-dual hybrid gradient (Applegate et al. 2021) in float64. The multipliers decide nothing by themselves:
whatever they are, as long as they are >= 0, the bound that is taken with them is sound.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.linear import Relaxed
from cactus_ray.bounds.rows import Rows
from cactus_ray.bounds.splits import Region

ITERATIONS, CHECK = 6000, 60
"""Most steps of one search, and after how many the iterates are judged and may restart."""


def leaf_multipliers(region: Region) -> tuple[Tensor, Rows, Tensor]:
    """Multipliers [B, U] and rows (float64) that make the region's bounds largest, and inputs [B, *shape] near optimal.

    The objective and every split constraint are taken as linear forms over the input, exact where nothing is relaxed
    any more. The rows are the region's; where outputs may be mixed, they are the mixture whose bound is largest, and
    the inputs those at which the largest of these outputs is smallest. Deterministic.
    """
    with torch.no_grad():
        relaxed = region.at(region.start(), torch.zeros_like(region.sign))
        center, radius = relaxed.box.center.flatten(1), relaxed.box.radius.flatten(1)
        inputs, splits = radius.shape[1], region.sign.shape[1]
        forms, right = _constraints(region, relaxed)
        # in units of the box
        matrix, right, used = forms * radius[:, None], right + (forms @ center[:, :, None])[:, :, 0], region.sign != 0
        if region.mixable is None:
            objective, constant = _form(relaxed, region.rows)
            cost = objective[:, 0] * radius
            start = constant[:, 0] + (objective[:, 0] * center).sum(1)
        else:
            outputs, values = _outputs(region, relaxed)
            # one variable more, above all of them: its range holds theirs
            level = ((outputs.abs().sum(2) + values.abs()) * region.mixable).amax(1)[:, None]
            matrix = torch.cat([F.pad(matrix, (0, 1)), torch.cat([outputs, -level.expand_as(values)[..., None]], 2)], 1)
            right, used = torch.cat([right, values], 1), torch.cat([used, region.mixable], 1)
            cost, start = F.pad(level, (inputs, 0)), torch.zeros_like(level[:, 0])
        # rows of length 1, so that no constraint is stiffer than another
        length = matrix.flatten(2).norm(dim=2)
        used &= length > 0
        length = torch.where(used, length, 1.0)
        matrix = torch.where(used[:, :, None], matrix / length[:, :, None], 0.0)
        right = torch.where(used, right / length, 0.0)
        cost = cost.nan_to_num(0.0)
        # of the objective as a whole: it may be constant where every ReLU is off
        size = (cost.norm(dim=1) + start.nan_to_num(0.0).abs()).clamp(min=1e-30)[:, None]
        start = start / size[:, 0]
        dual, primal = _solve(cost / size, matrix.nan_to_num(0.0), right.nan_to_num(0.0), start)
        points = (center + radius * primal[:, :inputs]).view_as(relaxed.box.center)
        dual = dual * size / length
        if region.mixable is None:
            return dual, region.rows, points
        weights = dual[:, splits:]
        total = weights.sum(1, keepdim=True)
        # without any weight the bound would be 0: as before
        found = (total > 0)[:, :, None]
        rows = torch.where(found, (weights / total)[:, None], region.rows.coefficients)
        return torch.where(found[:, 0], dual[:, :splits] / total, 0.0), Rows(rows), points


def _outputs(region: Region, relaxed: Relaxed) -> tuple[Tensor, Tensor]:
    """The outputs as forms over the box: coefficients [B, K, inputs] per radius, values [B, K] in its middle."""
    center, radius = relaxed.box.center.flatten(1), relaxed.box.radius.flatten(1)
    assert region.mixable is not None
    one = torch.eye(region.mixable.shape[1], dtype=center.dtype, device=center.device)
    forms, constants = _form(relaxed, Rows(one.expand(len(center), -1, -1)))
    return forms * radius[:, None], constants + (forms @ center[:, :, None])[:, :, 0]


def _form(relaxed: Relaxed, rows: Rows) -> tuple[Tensor, Tensor]:
    """Coefficients [B, S, inputs] and constants [B, S] over the input."""
    form, constant = relaxed.input_rows(rows)
    return form.dense(tuple(relaxed.box.center.shape[1:])).coefficients.flatten(2), constant


def _constraints(region: Region, relaxed: Relaxed) -> tuple[Tensor, Tensor]:
    """Every split as a form that is <= 0 on its half: coefficients [B, U, inputs] and constants [B, U]."""
    batch, count = region.index.shape
    forms = relaxed.box.center.new_zeros(batch, count, relaxed.box.center[0].numel())
    offsets = forms.new_zeros(batch, count)
    for node, shape, first, end in region.neurons.nodes:
        mine = (region.index >= first) & (region.index < end) & (region.sign != 0)
        columns = mine.any(0).nonzero()[:, 0]
        if len(columns) == 0:
            continue
        place = (region.index[:, columns] - first).clamp(0, end - first - 1)
        value = torch.where(mine, -region.sign, 0.0)[:, columns]
        rows = forms.new_zeros(batch, len(columns), end - first).scatter_(2, place[..., None], value[..., None])
        form, offset = _form(replace(relaxed, last=node.inputs[0]), Rows(rows.view(batch, len(columns), *shape)))
        forms[:, columns] += form * mine[:, columns, None]
        offsets[:, columns] += offset * mine[:, columns]
    return forms, offsets


def _solve(cost: Tensor, matrix: Tensor, right: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers [B, U] and t [B, n] of ``min cost t + start`` over t in [-1, 1] with ``matrix t + right <= 0``.

    Stops when every optimum is known to be positive, or is attained closely.
    """
    if matrix.shape[1] == 0:  # nothing was split: a linear network's optimum is a corner of the box
        return torch.zeros_like(right), -cost.sign()
    norm = torch.linalg.matrix_norm(matrix, ord=2).clamp(min=1e-12)[:, None]
    primal, dual = torch.zeros_like(cost), torch.zeros_like(right)
    weight = torch.ones_like(cost[:, :1])
    best, value = dual, _dual_value(cost, matrix, right, dual)
    best_primal, violation = primal, torch.full_like(value, torch.inf)
    anchor = dual
    for _ in range(ITERATIONS // CHECK):
        mean_primal, mean_dual = torch.zeros_like(primal), torch.zeros_like(dual)
        before = primal
        for _ in range(CHECK):
            step = primal - weight / norm * (cost + (dual[:, None] @ matrix)[:, 0])
            new = step.clamp(-1.0, 1.0)
            dual = (dual + (matrix @ (2 * new - primal)[:, :, None])[:, :, 0].add(right) / (weight * norm)).clamp(min=0)
            primal = new
            mean_primal, mean_dual = mean_primal + primal / CHECK, mean_dual + dual / CHECK
        for t, y in ((primal, dual), (mean_primal, mean_dual)):
            found = _dual_value(cost, matrix, right, y)
            better = found > value
            value, best = torch.where(better, found, value), torch.where(better[:, None], y, best)
            reach = (cost * t).sum(1) - value
            wrong = reach.clamp(min=0) + ((matrix @ t[:, :, None])[:, :, 0] + right).clamp(min=0).amax(1)
            closer = wrong < violation
            violation = torch.where(closer, wrong, violation)
            best_primal = torch.where(closer[:, None], t, best_primal)
        if bool(((value + start > 0) | (violation < 1e-9)).all()):
            break
        moved, turned = (mean_primal - before).norm(dim=1), (mean_dual - anchor).norm(dim=1)
        usable = (moved > 1e-12) & (turned > 1e-12)
        ratio = torch.where(usable, moved / turned.clamp(min=1e-12), weight[:, 0])
        weight = (0.5 * (weight[:, 0].log() + ratio.log())).exp().clamp(1e-4, 1e4)[:, None]
        primal, dual, anchor = mean_primal, mean_dual, mean_dual
    return best, best_primal


def _dual_value(cost: Tensor, matrix: Tensor, right: Tensor, dual: Tensor) -> Tensor:
    return (dual * right).sum(1) - (cost + (dual[:, None] @ matrix)[:, 0]).abs().sum(1)
