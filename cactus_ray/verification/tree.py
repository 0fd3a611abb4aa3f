"""The sub-problems of one sample: which are open, what is proved of the others, and when to stop."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEFAULT_SECONDS = 10.0
"""Seconds per sample where the settings give no limit."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits per sample: sub-problems that are bounded, seconds of its share of the work; iterations of each search.

    ``deadline``: value of ``time.perf_counter`` at which all of them end; None: no limit.
    """

    nodes: int = 10_000
    seconds: float = DEFAULT_SECONDS
    iterations: int = 10
    deadline: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One open sub-problem; ordered by its bound, then by age. ``row`` [K]: the form that was bounded."""

    lower: float
    order: int
    goal: int = field(compare=False)
    row: Tensor = field(compare=False)
    sign: Tensor = field(compare=False)
    alpha: Tensor = field(compare=False)
    beta: Tensor = field(compare=False)
    candidates: tuple[int, ...] = field(compare=False)


@dataclass(slots=True)
class Tree:
    """One sample's sub-problems. ``settled``: by goal, the smallest bound of those that are not split further.

    ``point``: a counterexample that replays. ``stuck``: something was settled without being proved. ``seconds``: its
    share of the work and what was spent before. ``nodes``: sub-problems bounded.
    """

    sample: int
    seconds: float
    open: list[Node] = field(default_factory=list)
    settled: dict[int, float] = field(default_factory=dict)
    stuck: bool = False
    point: Tensor | None = None
    nodes: int = 0

    def settle(self, goal: int, lower: float) -> None:
        """No more is done about a sub-problem with this bound."""
        self.settled[goal] = _least(lower, self.settled.get(goal, torch.inf))
        self.stuck |= not lower > 0

    def keep(self, node: Node) -> None:
        """A sub-problem to be split later."""
        heapq.heappush(self.open, node)

    def worst(self) -> Node:
        """Takes the open sub-problem with the smallest bound."""
        return heapq.heappop(self.open)

    def bounds(self) -> dict[int, float]:
        """By goal the smallest bound of its sub-problems: what is proved of the whole sample."""
        smallest = dict(self.settled)
        for node in self.open:
            smallest[node.goal] = _least(node.lower, smallest.get(node.goal, torch.inf))
        return smallest

    def reason(self, budget: Budget) -> str:
        """Why the tree does not grow any more; empty while it does, and where it is decided."""
        if self.point is not None:
            return ""
        if not self.open:
            return "bounds" if self.stuck else ""
        late = budget.deadline is not None and time.perf_counter() >= budget.deadline
        if late or self.seconds >= budget.seconds:
            return "time"
        return "nodes" if self.nodes >= budget.nodes else ""

    def growing(self, budget: Budget) -> bool:
        """Whether sub-problems are left to be split, and the budget to do so."""
        # also where a leaf could not be proved: what is left may hold a counterexample
        return bool(self.open) and self.point is None and not self.reason(budget)


def _least(one: float, other: float) -> float:
    """The smaller of two bounds; NaN where either is: a goal without a bound must never seem proved."""
    return one if math.isnan(one) or one < other else other
