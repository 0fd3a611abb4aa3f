"""Branch and bound over the signs of ReLU inputs (beta-CROWN: Wang et al. 2021; branching: Bunel et al. 2020).

Sub-problems of all samples are bounded together. Each sample's worst sub-problem is split first, at the ReLU whose two
halves promise most, and starts from its parent's slopes and multipliers. Where no ReLU is left to split, the bound is
that of a linear program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cactus_ray.bounds.alpha import Forms, MarginForms, Margins
from cactus_ray.bounds.ascent import Found, Search, batch_of, decide, optimise
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.leaves import leaf_multipliers
from cactus_ray.bounds.rows import Rows
from cactus_ray.bounds.splits import Problems, Region, Root
from cactus_ray.verification.attack import descend
from cactus_ray.verification.branching import candidates, picks, split
from cactus_ray.verification.soundness import Batch, Model, is_out_of_memory, margins_at, replays
from cactus_ray.verification.tree import DEFAULT_SECONDS, Budget, Node, Tree

__all__ = ["DEFAULT_SECONDS", "Branching", "Budget", "Goals", "Outcome", "branch", "inherited"]

ATTACK_STEPS = 10
"""Gradient steps from the worst minimiser of every sample, after every round."""


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


class Goals(Forms, Protocol):
    """What is to be proved of every sample: each goal holds where at every input one of its forms is above 0."""

    def members(self, goal: Tensor) -> Tensor | None:
        """The outputs [B, K] that are forms of goals [B] themselves, to be mixed; None: each goal has one form."""

    def clip(self, sample: Tensor, points: Tensor) -> Tensor:
        """The admissible float32 inputs that are nearest to points [B, *input] of samples [B]."""

    def fallen(self, sample: Tensor, points: Tensor) -> Iterator[int]:
        """Which of the admissible points are counterexamples that replay."""

    def descend(self, sample: Tensor, goal: Tensor, points: Tensor) -> Tensor:
        """Points nearer to counterexamples of goals [B], by ``ATTACK_STEPS`` gradient steps."""


@dataclass(frozen=True, slots=True)
class _MarginGoals(MarginForms):
    """Every margin of a batch's samples is a goal with one form: itself."""

    model: Model
    batch: Batch

    def members(self, goal: Tensor) -> Tensor | None:
        return None

    def clip(self, sample: Tensor, points: Tensor) -> Tensor:
        return self.batch.select(sample.tolist()).clip(points.float())

    def fallen(self, sample: Tensor, points: Tensor) -> Iterator[int]:
        part = self.batch.select(sample.tolist())
        with torch.no_grad():
            single = margins_at(forward(self.model.graph, self.model.single, points), part.labels).amin(1)
        found: set[int] = set()
        for i in (single < 0).nonzero()[:, 0].tolist():
            if int(sample[i]) in found:
                continue
            if bool(replays(self.model, part.select([i]), points[i, None])[0]):
                found.add(int(sample[i]))
                yield i

    def descend(self, sample: Tensor, goal: Tensor, points: Tensor) -> Tensor:
        return descend(self.model, self.batch.select(sample.tolist()), points, goal, ATTACK_STEPS)[0]


def branch(model: Model, batch: Batch, margins: Margins, budget: Budget, spent: Sequence[float] = ()) -> list[Outcome]:
    """Outcomes of the batch's samples (those of ``margins``, in order), whose open rows are split until proved.

    ``spent``: seconds of the budget that each sample has used up before; default: none. Deterministic unless the time
    strikes. Nothing depends on the search's rounding: every bound is taken in float64, every counterexample replays.
    """
    goals = _MarginGoals(batch.labels, margins.lower.shape[1], model, batch)
    work = Branching(model, goals, margins, budget, [Tree(n, s) for n, s in enumerate(spent or [0.0] * len(batch))])
    rows = range(len(margins.sample))
    opened = [r for r in rows if not bool(margins.lower[margins.sample[r], margins.other[r]] > 0)]
    work.run(opened, margins.other[opened].tolist())
    outcomes = []
    for tree in work.trees:
        lower = margins.lower[tree.sample].clone()
        for other, bound in tree.bounds().items():
            if float(lower[other]) < bound:  # false for NaN of either
                lower[other] = bound
        outcomes.append(Outcome(lower, tree.point, tree.reason(budget), tree.seconds, tree.nodes))
    return outcomes


@dataclass(slots=True)
class Branching:
    """The trees of ``margins``' samples, grown together. ``size``: sub-problems at once; fewer where memory ran out."""

    model: Model
    goals: Goals
    margins: Margins
    budget: Budget
    trees: list[Tree]
    index: Tensor = field(init=False)
    size: int = field(init=False)
    created: int = 0

    def __post_init__(self) -> None:
        self.index, self.size = self.root.unstable(), batch_of(self.root)

    @property
    def root(self) -> Root:
        return self.margins.root

    def run(self, opened: Sequence[int], goals: Sequence[int]) -> None:
        """Grow the trees from rows ``opened`` of the margins, each for one of the ``goals``, until all are decided."""
        at = 0
        while at < len(opened):
            part = slice(at, at + self.size)
            if self._fits(self._seed, opened[part], goals[part]):
                at = part.stop
        while any(tree.growing(self.budget) for tree in self.trees):
            self.grow()

    def _seed(self, opened: Sequence[int], goals: Sequence[int]) -> None:
        """One sub-problem without splits for every row."""
        begun = time.perf_counter()
        chosen = torch.tensor(opened, device=self.index.device)
        samples = self.margins.sample[chosen]
        alpha = self.margins.slopes(chosen).gather(1, self.index[samples])
        trees = [self.trees[s] for s in samples.tolist()]
        rows = self.goals.rows(samples, self.margins.other[chosen])
        problems = self._problems(trees, goals, rows, torch.zeros_like(alpha, dtype=torch.int8))
        found = decide(Region.of(self.root, problems), alpha, torch.zeros_like(alpha))
        self._take(trees, goals, problems, found, begun)

    def grow(self) -> None:
        """Split the worst sub-problems of every growing tree, and bound their halves."""
        growing = [tree for tree in self.trees if tree.growing(self.budget)]
        most = max(1, self.size // 4)
        each = max(1, most // len(growing))
        taken: list[tuple[Tree, Node]] = []
        for tree in growing[:most]:
            count = min(each, len(tree.open), max(1, (self.budget.nodes - tree.nodes) // 2))
            taken += [(tree, tree.worst()) for _ in range(count)]
        for leaf, how in ((True, self._leaves), (False, self._split)):
            some = [(tree, node) for tree, node in taken if leaf is not bool(node.candidates)]
            if some and not self._fits(how, [tree for tree, _ in some], [node for _, node in some]):
                for tree, node in some:
                    tree.keep(node)

    def _fits(self, work: Callable[..., None], *columns: Sequence[object]) -> bool:
        """Whether memory held for the work on sub-problems, at least one; else nothing was kept of it."""
        count = len(columns[0])
        try:
            work(*columns)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or count == 1:
                raise
        else:
            return True
        self.size = max(1, min(self.size, 4 * count) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _split(self, trees: Sequence[Tree], parents: Sequence[Node]) -> None:
        begun = time.perf_counter()
        goals, rows = [p.goal for p in parents], torch.stack([p.row for p in parents])
        alpha, beta = torch.stack([p.alpha for p in parents]), torch.stack([p.beta for p in parents])
        signs = torch.stack([p.sign for p in parents])
        whole = torch.tensor([p.lower for p in parents], dtype=torch.float64, device=alpha.device)
        problems = self._problems(trees, goals, rows, signs)
        signs = split(signs, picks(self.root, problems, alpha, beta, whole, [p.candidates for p in parents]))
        both, goals = [*trees, *trees], goals * 2
        problems = self._problems(both, goals, rows.repeat(2, 1), signs)
        how = Search(self.budget.iterations, alpha_rate=0.1, beta_rate=0.1, deadline=self.budget.deadline)
        found = optimise(self.root, problems, alpha.repeat(2, 1), beta.repeat(2, 1), how)
        lower = inherited(whole.repeat(2), found.lower)
        self._take(both, goals, problems, replace(found, lower=lower), begun)

    def _leaves(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> None:
        """Sub-problems without a ReLU to split: only their multipliers are left, those of a linear program."""
        begun = time.perf_counter()
        goals, rows = [n.goal for n in nodes], torch.stack([n.row for n in nodes])
        region = Region.of(self.root, self._problems(trees, goals, rows, torch.stack([n.sign for n in nodes])))
        alpha, beta = torch.stack([n.alpha for n in nodes]), torch.stack([n.beta for n in nodes])
        multipliers, mixture, points = leaf_multipliers(region)
        found = decide(replace(region, rows=mixture), alpha, multipliers)
        again = decide(region, alpha, beta)
        found = replace(found, lower=torch.where(again.lower > found.lower, again.lower, found.lower), points=points)
        self._attack(trees, goals, found)
        for tree, node, lower in zip(trees, nodes, found.lower.tolist(), strict=True):
            tree.settle(node.goal, lower if lower > node.lower else node.lower)
        _charge(trees, begun)

    def _problems(self, trees: Sequence[Tree], goals: Sequence[int], rows: Tensor, sign: Tensor) -> Problems:
        device = self.index.device
        sample = torch.tensor([tree.sample for tree in trees], device=device)
        mixable = self.goals.members(torch.tensor(goals, device=device))
        return Problems(sample, Rows(rows[:, None]), self.index[sample], sign, mixable)

    def _take(
        self, trees: Sequence[Tree], goals: Sequence[int], problems: Problems, found: Found, begun: float
    ) -> None:
        """Keep what is proved, queue the rest, look for counterexamples."""
        candidates = self._attack(trees, goals, found)
        for i, lower in enumerate(found.lower.tolist()):
            tree = trees[i]
            tree.nodes += 1
            if not lower <= 0:  # proved, or NaN: nothing that is derived from it would be a bound
                tree.settle(goals[i], lower)
                continue
            self.created += 1
            state = found.rows.coefficients[i, 0], problems.sign[i], found.alpha[i], found.beta[i]
            tree.keep(Node(lower, self.created, goals[i], *state, candidates[i]))
        _charge(trees, begun)

    def _attack(self, trees: Sequence[Tree], goals: Sequence[int], found: Found) -> list[tuple[int, ...]]:
        """Try the minimisers of the relaxations, and a short attack from the worst; returns what to split next."""
        samples = torch.tensor([tree.sample for tree in trees], device=self.index.device)
        points = self.goals.clip(samples, found.points)
        worst: dict[int, int] = {}
        for i, lower in enumerate(found.lower.tolist()):
            if lower <= 0 and (trees[i].sample not in worst or lower < found.lower[worst[trees[i].sample]]):
                worst[trees[i].sample] = i
        self._try(trees, samples, points)
        left = [i for i in worst.values() if trees[i].point is None]
        if left:
            target = torch.tensor([goals[i] for i in left], device=self.index.device)
            self._try([trees[i] for i in left], samples[left], self.goals.descend(samples[left], target, points[left]))
        return candidates(self.model, self.root, samples, self.index[samples], points, found)

    def _try(self, trees: Sequence[Tree], samples: Tensor, points: Tensor) -> None:
        for i in self.goals.fallen(samples, points):
            if trees[i].point is None:
                trees[i].point = points[i]


def _charge(trees: Sequence[Tree], begun: float) -> None:
    """Books the seconds since ``begun`` on the trees that were worked on."""
    share = (time.perf_counter() - begun) / len(trees)
    for tree in trees:
        tree.seconds += share


def inherited(whole: Tensor, lower: Tensor) -> Tensor:
    """Bounds of halves [B] that are no worse than those of what was split; a NaN stays."""
    return torch.where(whole > lower, whole, lower)
