"""Which ReLU of a sub-problem is split: scores, then a look at the halves (filtered smart branching).

None of this can make a bound wrong; it decides only how many sub-problems are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cactus_ray.bounds.ascent import Found, batch_of, parts
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.splits import Problems, Region, Root
from cactus_ray.verification.soundness import Model

CANDIDATES = 3
"""ReLUs by each of the two scores whose halves are bounded before one of them is split."""


def candidates(
    model: Model, root: Root, samples: Tensor, index: Tensor, points: Tensor, found: Found
) -> list[tuple[int, ...]]:
    """Variables (columns of ``index`` [B, U]) that are most promising to split; none where no ReLU is left.

    By what the relaxation of a ReLU loses at the minimiser ``points`` [B, C, H, W] (float32), and by BaBSR's intercept
    score (Bunel et al. 2020, Sec. 5.3). Leaky ReLUs are scored as ReLUs.
    """
    readers = [node.inputs[0] for node, *_ in root.neurons.nodes]
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        forward(model.graph, model.single, points, visit=lambda n, y: kept.__setitem__(n.name, y.flatten(1)))
    values = torch.cat([*(kept[name] for name in readers), points.new_zeros(len(points), 1)], 1).gather(1, index)
    low, high = (side[samples].gather(1, index).float() for side in (root.low, root.high))
    chord = high / (high - low)
    coefficients = found.coefficients.float()
    above = chord * (values - low) - values.clamp(min=0)
    below = values.clamp(min=0) - found.alpha * values
    lost = torch.where(coefficients < 0, -coefficients * above, coefficients * below)
    intercept = coefficients.clamp(max=0) * chord * low
    picked: list[list[int]] = [[] for _ in range(len(points))]
    for score in (lost, intercept):
        ranked = torch.where(found.free, score.nan_to_num(0.0).clamp(min=0.0), -1.0)
        best, places = ranked.topk(min(CANDIDATES, ranked.shape[1]), dim=1)
        for row, numbers, columns in zip(picked, best.tolist(), places.tolist(), strict=True):
            row += [c for n, c in zip(numbers, columns, strict=True) if n >= 0 and c not in row]
    return [tuple(row) for row in picked]


def picks(
    root: Root, problems: Problems, alpha: Tensor, beta: Tensor, whole: Tensor, tried: Sequence[Sequence[int]]
) -> Tensor:
    """Which variable [P] of every problem is split: of those ``tried`` (at least one) the one whose halves gain most.

    The halves are bounded with the problem's slopes and multipliers [P, U], in float32 (De Palma et al. 2021), and
    compared with its own bound ``whole`` [P]. The product of the gains balances the two halves.
    """
    device = alpha.device
    owner = torch.tensor([i for i, columns in enumerate(tried) for _ in columns], device=device)
    columns = torch.tensor([c for row in tried for c in row], device=device)
    signs = split(problems.sign[owner], columns)
    gains = []
    for part in parts(len(signs), batch_of(root), device):
        parent = owner.repeat(2)[part]
        half = replace(problems.select(parent), sign=signs[part])
        region = Region.of(root, half).single(root.single)
        with torch.no_grad():
            bound = region.at(alpha[parent], beta[parent]).lower_bounds(region.rows)[:, 0]
        gains.append(bound.clamp(max=0.0) - whole[parent].float())  # more than proved is worth nothing
    gain = torch.cat(gains).nan_to_num(0.0).clamp(min=1e-6)
    product = gain[: len(owner)] * gain[len(owner) :]
    best: dict[int, tuple[float, int]] = {}
    for i, value, column in zip(owner.tolist(), product.tolist(), columns.tolist(), strict=True):
        if i not in best or value > best[i][0]:
            best[i] = value, column
    return torch.tensor([best[i][1] for i in range(len(problems))], device=device)


def split(signs: Tensor, picked: Tensor) -> Tensor:
    """Both halves [2 P, U] of sub-problems with signs [P, U] at variables [P]: first all positive ones."""
    return torch.cat([signs.scatter(1, picked[:, None], value) for value in (1, -1)])
