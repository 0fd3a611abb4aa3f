"""Who is better among many by several measures: fronts that grow point by point, and an order within a front.

All values are losses: smaller is better, every one finite. Nothing here draws at random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cactus_ray.search.pareto import Array, beaten

Indices = npt.NDArray[np.int64]
REFERENCE = 1.1
"""The reference point of hypervolumes within a front, in units of the front's own range (0 best, 1 worst)."""
_CELLS = 400_000
_SAMPLES = 1024
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(float)


class Fronts:
    """Non-dominated sorting (Deb et al. 2002) kept up to date: front 0 is dominated by nobody, front k by front k - 1.

    Points are numbered in the order of ``add``; what order that was does not change the fronts. Equal points share a
    front. One insertion costs a few vectorised comparisons per front that it changes.
    """

    def __init__(self, columns: int) -> None:
        self.rows: Array = np.empty((16, columns))
        self.count = 0
        self.fronts: list[Indices] = []

    def add(self, row: Array) -> int:
        """Take up a point; the index of its front."""
        if self.count == len(self.rows):
            self.rows = np.concatenate([self.rows, np.empty_like(self.rows)])
        number, self.count = self.count, self.count + 1
        self.rows[number] = row
        first = place = self._place(row)
        moved: Indices = np.array([number])
        while len(moved):
            if place == len(self.fronts):
                self.fronts.append(moved)
                break
            members = self.fronts[place]
            behind = beaten(self.rows[members], self.rows[moved])
            if behind.all():  # a whole front falls behind the new one, and all after it by one place
                self.fronts.insert(place, moved)
                break
            self.fronts[place] = np.concatenate([members[~behind], moved])
            moved, place = members[behind], place + 1
        return first

    def ahead_of(self, front: int) -> int:
        """How many points are in better fronts."""
        return sum(len(members) for members in self.fronts[:front])

    def _place(self, row: Array) -> int:
        """The first front without anybody who dominates ``row``; whoever front k dominates, front k - 1 does too."""
        low, high = 0, len(self.fronts)
        while low < high:
            middle = (low + high) // 2
            if beaten(row[None], self.rows[self.fronts[middle]]).any():
                low = middle + 1
            else:
                high = middle
        return low


def within_front(rows: Array, ranking: str) -> Indices:
    """The order of a front's points [n, m], best first, as indices into ``rows``; ties go to the lower index.

    ``ranking``: a key of ``RANKINGS``. Columns are scaled to the front's own range. Of equal points the first one
    counts and the others come last, because together they are worth no more than one.
    """
    if len(rows) == 1:
        return np.zeros(1, dtype=np.int64)
    order = np.lexsort(rows.T)  # stable: the first of equal points stays the first
    new = np.append(True, (np.diff(rows[order], axis=0) != 0).any(axis=1))
    chosen = np.sort(order[new])
    worth = np.full(len(rows), -np.inf)
    worth[chosen] = RANKINGS[ranking](_scaled(rows[chosen]))
    return np.argsort(-worth, kind="stable").astype(np.int64)


def _scaled(rows: Array) -> Array:
    """Every column that differs at all, from 0 (best) to 1 (worst)."""
    low, span = rows.min(axis=0), np.ptp(rows, axis=0)
    found: Array = (rows[:, span > 0] - low[span > 0]) / span[span > 0]
    return found


def _contributions(rows: Array) -> Array:
    """The volume that each point alone dominates below ``REFERENCE`` in every column.

    Exact in two columns and for small fronts. Beyond, the volume of every point of a fixed low-discrepancy sequence is
    shared equally by all who dominate it (HypE's fitness, Bader and Zitzler 2011), since hardly any sample is then
    dominated by one point alone.
    """
    count, columns = rows.shape
    if columns == 2:
        order = np.argsort(rows[:, 0])
        x = np.append(rows[order, 0], REFERENCE)
        y = np.insert(rows[order, 1], 0, REFERENCE)
        found = np.empty(count)
        found[order] = np.diff(x) * -np.diff(y)
        return found
    if count * (count + 1) ** columns <= _CELLS:
        return _exact(rows)
    words = np.full((count, _SAMPLES // 64), -1, dtype=np.int64)  # a bit per sample: whether a point dominates it
    for (edges, behind), column in zip(_samples(columns), rows.T, strict=True):
        words &= behind.take(np.searchsorted(edges, column), axis=0)
    covers = words.view(np.uint8)
    many = np.unpackbits(covers, axis=1).sum(axis=0, dtype=np.int32)
    share = 1.0 / np.maximum(many, 1)
    worth = share.reshape(-1, 8) @ _BITS.T  # [bytes of a row of covers, 256]: of every value that a byte can have
    shares: Array = worth.ravel().take(covers + 256 * np.arange(_SAMPLES // 8, dtype=np.int32)).sum(axis=1)
    return shares


def _exact(rows: Array) -> Array:
    """Volumes of the cells between all coordinates, summed where one point alone dominates a cell."""
    count, columns = rows.shape
    volume = np.ones(())
    covers = np.ones((count,), dtype=bool)
    for j in range(columns):
        edges = np.unique(np.append(rows[:, j], REFERENCE))
        volume = volume[..., None] * np.diff(edges)
        inside = (rows[:, j, None] <= edges[None, :-1]).reshape(count, *[1] * j, -1)
        covers = covers[..., None] & inside
    alone = volume * (covers.sum(axis=0) == 1)
    found: Array = (covers * alone).reshape(count, -1).sum(axis=1)
    return found


@functools.lru_cache(maxsize=16)
def _samples(columns: int) -> list[tuple[Array, Indices]]:
    """By column: the coordinates of the samples in order, and packed bits [_SAMPLES + 1, _SAMPLES / 64] of those from
    the k-th coordinate on."""
    found = []
    for column in (REFERENCE * _sequence(columns)).T:
        place = np.argsort(np.argsort(column))
        behind = place[None, :] >= np.arange(_SAMPLES + 1)[:, None]
        found.append((np.sort(column), np.packbits(behind, axis=1).view(np.int64)))
    return found


@functools.lru_cache(maxsize=16)
def _sequence(columns: int) -> Array:
    """Points [_SAMPLES, columns] spread over the unit cube: additive recurrence with the generalised golden ratio."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1.0 + ratio) ** (1.0 / (columns + 1))
    steps = ratio ** -np.arange(1.0, columns + 1)
    points: Array = (0.5 + np.arange(1, _SAMPLES + 1)[:, None] * steps) % 1.0
    return points


def _crowding(rows: Array) -> Array:
    """Crowding distance of NSGA-II (Deb et al. 2002): infinite at the ends of every column."""
    found = np.zeros(len(rows))
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        found[order[[0, -1]]] = np.inf
        found[order[1:-1]] += column[order[2:]] - column[order[:-2]]
    return found


def _epsilon_net(rows: Array) -> Array:
    """Farthest-first traversal from the best of the first column: every prefix is an epsilon-net of the front.

    As in Schmucker et al. 2021 (multi-objective asynchronous successive halving), with a fixed first point.
    """
    found = np.empty(len(rows))
    distance = np.full(len(rows), np.inf)
    chosen = int(np.argmin(rows[:, 0])) if rows.shape[1] else 0
    for place in range(len(rows)):
        found[chosen] = -place
        distance = np.minimum(distance, ((rows - rows[chosen]) ** 2).sum(axis=1))
        distance[chosen] = -1.0
        chosen = int(np.argmax(distance))
    return found


RANKINGS: dict[str, Callable[[Array], Array]] = {
    "hypervolume": _contributions, "crowding": _crowding, "epsilon_net": _epsilon_net,
}  # fmt: skip
"""What the points of one front [n, m], scaled and all different, are worth; more is better."""
