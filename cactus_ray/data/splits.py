"""Which sample belongs to which split: fixed by a seed, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


def generator(seed: int) -> np.random.Generator:
    """A named bit generator: numpy's default may change, PCG64 does not."""
    return np.random.Generator(np.random.PCG64(seed))


def subset(n_total: int, count: int | None, seed: int = 0) -> Tensor:
    """A fixed random subset of ``range(n_total)``: int64 [min(count, n_total)], sorted; None gives all of it.

    A smaller subset of the same seed lies inside a larger one, so that figures on more samples extend those on fewer.
    """
    if count is None or count >= n_total:
        return torch.arange(n_total)
    return torch.from_numpy(np.sort(generator(seed).permutation(n_total)[:count]))


def hold_out(n_total: int, count: int, seed: int = 0) -> tuple[Indices, Indices]:
    """``range(n_total)`` as (kept, held out), disjoint and each sorted; ``count`` samples are held out at random."""
    order = generator(seed).permutation(n_total)
    return np.sort(order[count:]), np.sort(order[:count])


def stratified(labels: Indices, fractions: Sequence[float], seed: int = 0) -> tuple[Indices, ...]:
    """Disjoint parts of ``range(len(labels))``: one per fraction, then the rest; each sorted.

    Every part takes ``round(fraction * n)`` of the n samples of each class.
    """
    random = generator(seed)
    parts: list[list[Indices]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum([round(fraction * len(members)) for fraction in fractions])
        for part, chosen in zip(parts, np.split(members, ends), strict=True):
            part.append(chosen)
    return tuple(np.sort(np.concatenate(part)) for part in parts)
