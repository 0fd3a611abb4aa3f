"""Who is better among many by several measures: fronts that grow point by point, and an order within a front.

All values are losses: smaller is better, every one finite. Nothing here draws at random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_ray.search.pareto import Array, beaten

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.int64]  # 64 bits each
Worth = Callable[[Indices, Array], Array]
REFERENCE = 1.1
"""The reference point of hypervolumes within a front, in units of the front's own range (0 best, 1 worst)."""
_CELLS = 400_000
_SAMPLES = 1024
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(float)


class Fronts:
    """Non-dominated sorting (Deb et al. 2002) kept up to date: front 0 is dominated by nobody, front k by front k - 1.

    Points are numbered in the order of ``add``; what order that was does not change the fronts. Equal points share a
    front. One insertion costs a comparison with all, and a few vectorised ones per front that it changes. ``place``: by
    number, its front; ``first``: whether no equal point came before.
    """

    def __init__(self, columns: int) -> None:
        self.columns: Array = np.empty((columns, 16))  # a column of all points lies in one piece
        self.place: Indices = np.zeros(16, dtype=np.int64)
        self.first: npt.NDArray[np.bool_] = np.zeros(16, dtype=np.bool_)
        self.count = 0
        self.fronts: list[Indices] = []
        self._known: set[bytes] = set()

    def add(self, row: Array) -> int:
        """Take up a point; the index of its front."""
        place = self._behind(row)
        number = self._append(row, place)
        moved: Indices = np.array([number])
        while len(moved):
            if place == len(self.fronts):
                self.fronts.append(moved)
                break
            members = self.fronts[place]
            behind = self._beaten(members, moved)
            if len(behind) == len(members):  # a whole front falls behind the new one, and all after it by one place
                self.place[: self.count][self.place[: self.count] >= place] += 1
                self.place[moved] = place
                self.fronts.insert(place, moved)
                break
            self.place[behind] = place + 1
            self.fronts[place] = np.concatenate([members[self.place[members] == place], moved])
            moved, place = behind, place + 1
        return int(self.place[number])

    def rows(self, numbers: Indices) -> Array:
        """The points of these numbers [n, columns]."""
        found: Array = self.columns[:, numbers].T
        return found

    def ahead_of(self, front: int) -> int:
        """How many points are in better fronts."""
        return sum(len(members) for members in self.fronts[:front])

    def _behind(self, row: Array) -> int:
        """The first front without anybody who dominates ``row``; whoever front k dominates, front k - 1 does too."""
        no_worse = np.ones(self.count, dtype=np.bool_)
        for column, value in zip(self.columns, row, strict=True):
            no_worse &= column[: self.count] <= value
        ahead = np.flatnonzero(no_worse)
        ahead = ahead[(self.columns[:, ahead] < row[:, None]).any(axis=0)]
        return int(self.place[ahead].max()) + 1 if len(ahead) else 0

    def _append(self, row: Array, place: int) -> int:
        """Its number."""
        number, self.count = self.count, self.count + 1
        if number == len(self.first):
            self.columns = np.concatenate([self.columns, np.empty_like(self.columns)], axis=1)
            self.place = np.concatenate([self.place, np.zeros_like(self.place)])
            self.first = np.concatenate([self.first, np.zeros_like(self.first)])
        self.columns[:, number] = row
        self.place[number] = place
        key = (row + 0.0).tobytes()  # -0.0 is 0.0
        self.first[number] = key not in self._known
        self._known.add(key)
        return number

    def _beaten(self, members: Indices, by: Indices) -> Indices:
        """Those of ``members`` whom one of ``by`` dominates; a column or two leave few that can be."""
        for column in self.columns:
            members = members[column[members] >= column[by].min()]
        found: Indices = members[beaten(self.rows(members), self.rows(by))]
        return found


class Order:
    """The order within one front, best first; ties go to the lower number.

    ``ranking``: a key of ``RANKINGS``. Of equal points the first one counts and the others come last, because together
    they are worth no more than one. Worked out anew where the members are others than before.
    """

    def __init__(self, ranking: str) -> None:
        self.members: Indices = np.empty(0, dtype=np.int64)
        self._worth: Array = np.empty(0)
        self._best: Indices | None = None
        self._of: Worth = RANKINGS[ranking]()

    def update(self, fronts: Fronts, front: int) -> None:
        """Take up the members of a front as they are now."""
        members = np.sort(fronts.fronts[front])
        if np.array_equal(members, self.members):
            return
        first = fronts.first[members]
        worth = np.full(len(members), -np.inf)
        worth[first] = self._of(members[first], fronts.rows(members[first]))
        self.members, self._worth, self._best = members, worth, None

    def rank(self, number: int) -> int:
        """The place of a member, from 1."""
        place = int(np.searchsorted(self.members, number))
        mine = self._worth[place]
        return int((self._worth > mine).sum() + (self._worth[: place + 1] == mine).sum())

    @property
    def best(self) -> Indices:
        """The members' numbers, best first."""
        if self._best is None:
            self._best = self.members[np.argsort(-self._worth, kind="stable")]
        return self._best


def _range(rows: Array) -> tuple[Array, Array]:
    """The best value of every column, and how much worse the worst one is."""
    low = rows.min(axis=0)
    return low, rows.max(axis=0) - low


def _scaled(rows: Array, low: Array, span: Array) -> Array:
    """Every column that differs at all, from 0 (best) to 1 (worst)."""
    wide = span > 0
    found: Array = (rows.T[wide] - low[wide, None]) / span[wide, None]
    return found.T


class _Volumes:
    """The volume that each point of a front alone dominates below ``REFERENCE`` in every column.

    Exact in two columns and for small fronts. Beyond, the volume of every point of a fixed low-discrepancy sequence is
    shared equally by all who dominate it (HypE's fitness, Bader and Zitzler 2011), since hardly any sample is then
    dominated by one point alone. Whom a sample is dominated by is kept for those that stay where they are.
    """

    def __init__(self) -> None:
        self.numbers: Indices = np.empty(0, dtype=np.int64)
        self.range: tuple[Array, Array] = np.empty(0), np.empty(0)
        self.words: Words = np.empty((0, _SAMPLES // 64), dtype=np.int64)  # a bit per sample: whether it is dominated
        self.many: Indices = np.zeros(_SAMPLES, dtype=np.int64)  # by so many

    def __call__(self, numbers: Indices, rows: Array) -> Array:
        """Of all points of the front now; see ``RANKINGS``."""
        low, span = _range(rows)
        count, columns = len(rows), int((span > 0).sum())
        if columns == 2:
            return _between(_scaled(rows, low, span))
        if count * (count + 1) ** columns <= _CELLS:
            return _exact(_scaled(rows, low, span))
        self._follow(numbers, rows, low, span)
        share = 1.0 / np.maximum(self.many, 1)
        worth = (share.reshape(-1, 8) @ _BITS.T).ravel()  # [bytes of a row of covers, 256]: of every value of a byte
        places = 256 * np.arange(_SAMPLES // 8)
        covers = self.words.view(np.uint8)
        return np.concatenate([worth.take(part + places).sum(axis=1) for part in _parts(covers)])

    def _follow(self, numbers: Indices, rows: Array, low: Array, span: Array) -> None:
        """Bring up to date what is kept."""
        if not (np.array_equal(low, self.range[0]) and np.array_equal(span, self.range[1])):
            self.range = low, span
            self.numbers, self.words, self.many = numbers[:0], self.words[:0], np.zeros_like(self.many)
        old, new = np.zeros((2, 1 + max(numbers.max(), self.numbers.max(initial=0))), dtype=np.bool_)
        old[self.numbers], new[numbers] = True, True
        kept, stay = old[numbers], new[self.numbers]
        words = np.empty((len(rows), _SAMPLES // 64), dtype=np.int64)
        words[kept], words[~kept] = self.words[stay], _covers(_scaled(rows[~kept], low, span))
        self.many = self.many - _counted(self.words[~stay]) + _counted(words[~kept])
        self.numbers, self.words = numbers, words


def _between(rows: Array) -> Array:
    """Volumes in two columns: rectangles between a point and its neighbours."""
    order = np.argsort(rows[:, 0])
    x = np.append(rows[order, 0], REFERENCE)
    y = np.insert(rows[order, 1], 0, REFERENCE)
    found = np.empty(len(rows))
    found[order] = np.diff(x) * -np.diff(y)
    return found


def _covers(rows: Array) -> Words:
    """A bit per sample: whether a point dominates it."""
    words: Words = np.full((len(rows), _SAMPLES // 64), -1, dtype=np.int64)
    for (edges, behind), column in zip(_samples(rows.shape[1]), rows.T, strict=True):
        words &= behind.take(np.searchsorted(edges, column), axis=0)
    return words


def _counted(words: Words) -> Indices:
    """Points per sample."""
    found = np.zeros(_SAMPLES, dtype=np.int64)
    for part in _parts(words.view(np.uint8)):
        found += np.unpackbits(part, axis=1).sum(axis=0, dtype=np.uint8)
    return found


def _parts(rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """A few rows at a time, so that what is worked out of them stays in the cache; fewer than a byte can count."""
    return [rows[i : i + 128] for i in range(0, len(rows), 128)]


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
def _samples(columns: int) -> list[tuple[Array, Words]]:
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


def _anew(worth: Callable[[Array], Array]) -> Callable[[], Worth]:
    """Of scaled rows, worked out every time."""
    return lambda: lambda numbers, rows: worth(_scaled(rows, *_range(rows)))


RANKINGS: dict[str, Callable[[], Worth]] = {
    "hypervolume": _Volumes, "crowding": _anew(_crowding), "epsilon_net": _anew(_epsilon_net),
}  # fmt: skip
"""Makes, for one front, the function that says what its points are worth: their numbers, growing, and [n, m], all
different; more is better. Columns are scaled to the front's own range. It may keep what it finds for the next time."""
