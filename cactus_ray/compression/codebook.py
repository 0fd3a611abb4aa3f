"""Weights that share few values: clusters around zero (the ZeroKmeans of ATMC, Gui et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 20


def cluster(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Places uint8 (shape of ``values``) in a table float64 [2^bits] of values that stand for them.

    One cluster is fixed at 0 and has place 0; it takes all zeros, and what is nearer to 0 than to any other centre. The
    others follow Lloyd's rule for at most 20 rounds, from two starts, evenly spaced and of equal counts; the smaller
    squared error wins. Values that are few enough stand for themselves. Sorted, but for the 0 in front and zeros where
    there are fewer. Deterministic. ``bits`` from 1 to 8, else ValueError.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits}; expected 1 to 8")
    flat = values.detach().double().flatten()
    ordered = flat[flat != 0].sort().values
    count = 2**bits - 1
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= count:
        places = torch.where(flat == 0, 0, 1 + torch.searchsorted(distinct, flat))
        table = torch.cat([distinct.new_zeros(1), distinct, distinct.new_zeros(count - len(distinct))])
        return places.to(torch.uint8).view(values.shape), table
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    even = ordered[0] + (ordered[-1] - ordered[0]) * torch.linspace(0, 1, count, dtype=torch.float64)
    equal = ordered[(share * len(ordered)).long()]
    centres = min((_lloyd(ordered, start) for start in (even, equal)), key=lambda found: _error(ordered, found))
    places = _nearest(flat, centres)
    zero = int((centres == 0).nonzero()[0])
    table = torch.cat([centres[zero : zero + 1], centres[:zero], centres[zero + 1 :]])
    places = torch.where(places == zero, 0, torch.where(places < zero, places + 1, places))
    return places.to(torch.uint8).view(values.shape), table


def _lloyd(ordered: Tensor, start: Tensor) -> Tensor:
    """Sorted centres [len(start) + 1], one of them 0, that a fixed number of rounds leads to from ``start``."""
    centres = torch.cat([start, start.new_zeros(1)]).sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    zero = int((centres == 0).nonzero()[0])
    for _ in range(ROUNDS):
        ends = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, right=True)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts = ends.diff()
        means = sums[ends].diff() / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centres)
        moved[zero] = 0.0
        moved = moved.sort().values  # a mean is rounded and may pass its neighbour by that much
        zero = int((moved == 0).nonzero()[0])
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Places of the nearest centres; zeros belong to the centre 0, positive values in a middle to the lower centre."""
    places = torch.searchsorted(centres.contiguous(), values).clamp(1, len(centres) - 1)
    below, above = centres[places - 1], centres[places]
    near = torch.where((values - below).abs() <= (above - values).abs(), places - 1, places)
    zero = int((centres == 0).nonzero()[0])
    return torch.where(values == 0, zero, near)


def _error(ordered: Tensor, centres: Tensor) -> float:
    return float((ordered - centres[_nearest(ordered, centres)]).square().sum())
