"""Branch and bound over the signs of ReLU inputs (beta-CROWN: Wang et al. 2021; branching: Bunel et al. 2020).

Sub-problems of all samples are bounded together. Each sample's worst sub-problem is split first, at the ReLU whose two
halves promise most, and starts from its parent's slopes and multipliers. Where no ReLU is left to split, the bound is
that of a linear program.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cactus_ray.bounds.alpha import Margins, margin_problems
from cactus_ray.bounds.ascent import Found, Search, batch_of, decide, optimise
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.leaves import leaf_multipliers
from cactus_ray.bounds.splits import Problems, Region, Root
from cactus_ray.verification.attack import descend
from cactus_ray.verification.branching import candidates, picks, split
from cactus_ray.verification.soundness import Batch, Model, margins_at, replays

ATTACK_STEPS = 10
"""Gradient steps from the worst minimiser of every sample, after every round."""
DEFAULT_SECONDS = 10.0
"""Seconds per sample where the settings give no limit."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits per sample: sub-problems that are bounded, seconds of its share of the work; iterations of each search."""

    nodes: int = 10_000
    seconds: float = DEFAULT_SECONDS
    iterations: int = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What branch and bound says of one sample.

    ``lower`` [classes]: margin bounds (float64). ``point``: a counterexample that replays, or None. ``reason``: empty
    where the sample is decided, else what stood in the way: time, nodes, bounds. ``seconds``: its share of the work and
    what was spent before. ``nodes``: sub-problems bounded.
    """

    lower: Tensor
    point: Tensor | None
    reason: str
    seconds: float
    nodes: int


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    """One open sub-problem; ordered by its bound, then by age."""

    lower: float
    order: int
    other: int = field(compare=False)
    sign: Tensor = field(compare=False)
    alpha: Tensor = field(compare=False)
    beta: Tensor = field(compare=False)
    candidates: tuple[int, ...] = field(compare=False)


@dataclass(slots=True)
class _Tree:
    """One sample's sub-problems. ``settled``: by class, the smallest bound of those that are not split further."""

    sample: int
    label: int
    seconds: float
    open: list[_Node] = field(default_factory=list)
    settled: dict[int, float] = field(default_factory=dict)
    stuck: bool = False
    point: Tensor | None = None
    nodes: int = 0
    created: int = 0

    def settle(self, other: int, lower: float) -> None:
        # a NaN must stay, or a class without a bound would seem proved
        old = self.settled.get(other, torch.inf)
        self.settled[other] = old if old <= lower else lower

    def reason(self, budget: Budget) -> str:
        """Why the tree does not grow any more; empty while it does, and where it is decided."""
        if self.point is not None:
            return ""
        if not self.open:
            return "bounds" if self.stuck else ""
        if self.seconds >= budget.seconds:
            return "time"
        return "nodes" if self.nodes >= budget.nodes else ""

    def growing(self, budget: Budget) -> bool:
        # also where a leaf could not be proved: what is left may hold a counterexample
        return bool(self.open) and self.point is None and not self.reason(budget)


def branch(model: Model, batch: Batch, margins: Margins, budget: Budget, spent: Sequence[float] = ()) -> list[Outcome]:
    """Outcomes of the batch's samples (those of ``margins``, in order), whose open rows are split until proved.

    ``spent``: seconds of the budget that each sample has used up before; default: none. Deterministic unless the time
    strikes. Nothing depends on the search's rounding: every bound is taken in float64, every counterexample replays.
    """
    work = _Branching(model, batch, margins, budget)
    work.seed(spent or [0.0] * len(batch))
    while any(tree.growing(budget) for tree in work.trees):
        work.grow()
    return [work.outcome(tree) for tree in work.trees]


@dataclass(slots=True)
class _Branching:
    model: Model
    batch: Batch
    margins: Margins
    budget: Budget
    trees: list[_Tree] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def root(self) -> Root:
        return self.margins.root

    def seed(self, spent: Sequence[float]) -> None:
        """One sub-problem without splits for every row that is open."""
        labels = self.batch.labels.tolist()
        self.trees = [_Tree(sample, *rest) for sample, rest in enumerate(zip(labels, spent, strict=True))]
        self.index = self.root.unstable()
        rows = range(len(self.margins.sample))
        opened = [r for r in rows if not bool(self.margins.lower[self.margins.sample[r], self.margins.other[r]] > 0)]
        for start in range(0, len(opened), batch_of(self.root)):
            begun = time.perf_counter()
            chosen = torch.tensor(opened[start : start + batch_of(self.root)], device=self.index.device)
            others, alpha = self.margins.other[chosen].tolist(), self.margins.slopes(chosen)
            samples = self.margins.sample[chosen]
            alpha = alpha.gather(1, self.index[samples])
            trees = [self.trees[s] for s in samples.tolist()]
            problems = self._problems(trees, others, torch.zeros_like(alpha, dtype=torch.int8))
            found = decide(Region.of(self.root, problems), alpha, torch.zeros_like(alpha))
            self._take(trees, others, problems, found, begun)

    def grow(self) -> None:
        """Split the worst sub-problems of every growing tree, and bound their halves."""
        begun = time.perf_counter()
        growing = [tree for tree in self.trees if tree.growing(self.budget)]
        each = max(1, batch_of(self.root) // 4 // len(growing))
        trees: list[_Tree] = []
        parents: list[_Node] = []
        for tree in growing[: max(1, batch_of(self.root) // 4)]:
            for _ in range(min(each, len(tree.open), max(1, (self.budget.nodes - tree.nodes) // 2))):
                trees.append(tree)
                parents.append(heapq.heappop(tree.open))
        leaves = [not parent.candidates for parent in parents]
        for leaf in (True, False):
            some = [i for i, flag in enumerate(leaves) if flag is leaf]
            if some:
                chosen = [trees[i] for i in some], [parents[i] for i in some]
                begun = self._leaves(*chosen, begun) if leaf else self._split(*chosen, begun)

    def _split(self, trees: list[_Tree], parents: list[_Node], begun: float) -> float:
        alpha, beta = torch.stack([p.alpha for p in parents]), torch.stack([p.beta for p in parents])
        signs = torch.stack([p.sign for p in parents])
        whole = torch.tensor([p.lower for p in parents], dtype=torch.float64, device=alpha.device)
        problems = self._problems(trees, [p.other for p in parents], signs)
        signs = split(signs, picks(self.root, problems, alpha, beta, whole, [p.candidates for p in parents]))
        both, others = trees * 2, [p.other for p in parents] * 2
        problems = self._problems(both, others, signs)
        how = Search(iterations=self.budget.iterations, alpha_rate=0.1, beta_rate=0.1)
        found = optimise(self.root, problems, alpha.repeat(2, 1), beta.repeat(2, 1), how)
        lower = inherited(whole.repeat(2), found.lower)
        return self._take(both, others, problems, replace(found, lower=lower), begun)

    def _leaves(self, trees: list[_Tree], nodes: list[_Node], begun: float) -> float:
        """Sub-problems without a ReLU to split: only their multipliers are left, those of a linear program."""
        problems = self._problems(trees, [n.other for n in nodes], torch.stack([n.sign for n in nodes]))
        alpha, beta = torch.stack([n.alpha for n in nodes]), torch.stack([n.beta for n in nodes])
        region = Region.of(self.root, problems)
        multipliers, points = leaf_multipliers(region)
        found = decide(region, alpha, multipliers)
        again = decide(region, alpha, beta)
        found = replace(found, lower=torch.where(again.lower > found.lower, again.lower, found.lower), points=points)
        self._attack(trees, [n.other for n in nodes], found)
        for tree, node, lower in zip(trees, nodes, found.lower.tolist(), strict=True):
            tree.settle(node.other, lower if lower > node.lower else node.lower)
            tree.stuck |= not lower > 0
        return self._charge(trees, begun)

    def _problems(self, trees: Sequence[_Tree], others: Sequence[int], sign: Tensor) -> Problems:
        device = self.index.device
        sample = torch.tensor([tree.sample for tree in trees], device=device)
        other = torch.tensor(others, device=device)
        classes = self.margins.lower.shape[1]
        labels = self.batch.labels[sample]
        return replace(margin_problems(self.root, sample, labels, other, classes, self.index[sample]), sign=sign)

    def _take(self, trees: list[_Tree], others: list[int], problems: Problems, found: Found, begun: float) -> float:
        """Keep what is proved, queue the rest, look for counterexamples; returns the time."""
        candidates = self._attack(trees, others, found)
        for i, lower in enumerate(found.lower.tolist()):
            tree = trees[i]
            tree.nodes += 1
            if lower > 0:
                tree.settle(others[i], lower)
            elif not lower <= 0:  # NaN: nothing that is derived from it would be a bound
                tree.settle(others[i], lower)
                tree.stuck = True
            else:
                tree.created += 1
                node = _Node(
                    lower, tree.created, others[i], problems.sign[i], found.alpha[i], found.beta[i], candidates[i]
                )
                heapq.heappush(tree.open, node)
        return self._charge(trees, begun)

    def _attack(self, trees: list[_Tree], others: list[int], found: Found) -> list[tuple[int, ...]]:
        """Try the minimisers of the relaxations, and a short attack from the worst; returns what to split next."""
        samples = torch.tensor([tree.sample for tree in trees], device=self.index.device)
        part = self.batch.select(samples.tolist())
        points = torch.minimum(torch.maximum(found.points.float(), part.lower), part.upper)
        worst: dict[int, int] = {}
        for i, lower in enumerate(found.lower.tolist()):
            if lower <= 0 and (trees[i].sample not in worst or lower < found.lower[worst[trees[i].sample]]):
                worst[trees[i].sample] = i
        self._try(trees, part, points)
        left = [i for i in worst.values() if trees[i].point is None]
        if left:
            target = torch.tensor([others[i] for i in left], device=self.index.device)
            some = part.select(left)
            ends, _ = descend(self.model, some, points[left], target, ATTACK_STEPS)
            self._try([trees[i] for i in left], some, ends)
        return candidates(self.model, self.root, samples, self.index[samples], points, found)

    def _try(self, trees: Sequence[_Tree], part: Batch, points: Tensor) -> None:
        with torch.no_grad():
            single = margins_at(forward(self.model.graph, self.model.single, points), part.labels).amin(1)
        for i in (single < 0).nonzero()[:, 0].tolist():
            if trees[i].point is None and bool(replays(self.model, part.select([i]), points[i, None])[0]):
                trees[i].point = points[i]

    def _charge(self, trees: list[_Tree], begun: float) -> float:
        now = time.perf_counter()
        for tree in trees:
            tree.seconds += (now - begun) / len(trees)
        return now

    def outcome(self, tree: _Tree) -> Outcome:
        lower = self.margins.lower[tree.sample].clone()
        smallest = dict(tree.settled)
        for node in tree.open:
            smallest[node.other] = min(node.lower, smallest.get(node.other, torch.inf))
        for other, bound in smallest.items():
            if float(lower[other]) < bound:  # false for NaN of either
                lower[other] = bound
        return Outcome(lower, tree.point, tree.reason(self.budget), tree.seconds, tree.nodes)


def inherited(whole: Tensor, lower: Tensor) -> Tensor:
    """Bounds of halves [B] that are no worse than those of what was split; a NaN stays."""
    return torch.where(whole > lower, whole, lower)
