"""Bounds whose slopes are optimised (alpha-CROWN, Xu et al. 2021): boxes of the nodes inside, and margins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.ascent import BOX_STEPS, Search, batch_of, optimise, parts
from cactus_ray.bounds.graph import RELUS, Graph, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import FULL_EFFORT, Effort, Relaxed
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.rows import Rows
from cactus_ray.bounds.slopes import own_slopes, with_slopes
from cactus_ray.bounds.splits import Network, Problems, Root

__all__ = [
    "Forms", "MarginForms", "Margins", "Search", "alpha_forms", "alpha_margins", "form_problems", "tightened_boxes",
]  # fmt: skip


def tightened_boxes(
    network: Network, boxes: Mapping[str, Box], steps: int = BOX_STEPS, effort: Effort = FULL_EFFORT
) -> dict[str, Box]:
    """Boxes of ``linear.intermediate_boxes`` intersected with optimised bounds of unstable ReLUs; each has its slopes.

    In the network's order, each layer from the tightened ones before it. ``steps``: of the slopes, for every layer of
    ReLUs that the bound passes. ``effort``: rows of a layer and sample that are optimised (the loosest first), and the
    deadline from which on boxes stay as they are.
    """
    graph, rounding = network.graph, network.rounding
    step = interval.step if rounding is None else rounding.step
    found: dict[str, Box] = {}
    readers = graph.consumers()
    if effort.memory is None and network.device.type != "cpu":  # a search holds several tensors at once
        effort = replace(effort, memory=linear.memory_of(network.device) // 8)

    def bounded(relaxed: Relaxed, rows: Rows) -> Tensor:
        layers = sum(graph[name].op in RELUS for name in relaxed.relaxations)
        own = own_slopes(relaxed, network.single, rows, steps * layers)
        return with_slopes(relaxed, own).lower_bounds(rows)

    for node in graph.nodes[:-1]:
        box = boxes[node.name]
        if node.op != "input":  # what earlier layers gained is worth something here, too
            box = _intersection(box, step(node, network.params, [found[i] for i in node.inputs]))
        late = effort.deadline is not None and time.perf_counter() >= effort.deadline
        if {reader.op for reader in readers[node.name]} & set(RELUS) and not late:
            relaxed = Relaxed.on(graph, network.params, {**found, node.name: box}, node.name, rounding)
            if any(graph[name].op in RELUS for name in relaxed.relaxations):  # else CROWN's bounds are exact
                box = linear.tighten(relaxed, box, linear.looseness_of(box, pooled=False), effort, bounded)
        found[node.name] = box if rounding is None or node.op == "input" else rounding.seal(box)
    return found


def _intersection(box: Box, other: Box) -> Box:
    """Where the other is narrower it; where the intersection is empty, which only rounding can cause, ``box``."""
    lower = torch.where(other.lower > box.lower, other.lower, box.lower)
    upper = torch.where(other.upper < box.upper, other.upper, box.upper)
    empty = lower > upper
    return Box.between(torch.where(empty, box.lower, lower), torch.where(empty, box.upper, upper))


class Forms(Protocol):
    """R linear forms over the outputs of every sample, of which lower bounds above a number are wanted."""

    def rows(self, sample: Tensor, form: Tensor) -> Tensor:
        """Coefficients [B, K], float64, of forms [B] of samples [B]."""

    def open(self, lower: Tensor, target: float) -> Tensor:
        """Which forms [N, R] are worth raising where all have the given lower bounds."""


@dataclass(frozen=True, slots=True)
class MarginForms:
    """Margins ``logit[label] - logit[j]`` of samples with labels [N], by class j."""

    labels: Tensor
    classes: int

    def rows(self, sample: Tensor, form: Tensor) -> Tensor:
        """As of ``Forms``."""
        rows = torch.zeros(len(sample), self.classes, dtype=torch.float64, device=sample.device)
        rows.scatter_(1, self.labels[sample, None], 1.0)
        return rows.scatter_add_(1, form[:, None], rows.new_full((len(sample), 1), -1.0))

    def open(self, lower: Tensor, target: float) -> Tensor:
        """Those of other classes that are not above the target; NaN is not."""
        return (~(lower > target)).scatter(1, self.labels[:, None], False)


@dataclass(frozen=True, slots=True)
class Margins:
    """What alpha-CROWN leaves behind: ``lower`` [N, R] of forms, and for branching the root and slopes of open rows.

    Of margins, forms are classes. ``sample``, ``other`` [O]: the samples and forms that were optimised last; ``index``,
    ``alpha`` [O, U] their variables; without ``alpha`` those are CROWN's slopes.
    """

    lower: Tensor
    root: Root
    sample: Tensor
    other: Tensor
    index: Tensor
    alpha: Tensor | None

    def slopes(self, rows: Tensor) -> Tensor:
        """Slopes of some rows [n, F + 1]; 0 where a ReLU is linear."""
        flat = self.root.low.new_zeros(len(rows), self.root.low.shape[1], dtype=torch.float32)
        return flat if self.alpha is None else flat.scatter(1, self.index[rows], self.alpha[rows])

    def select(self, samples: Tensor) -> Margins:
        """What concerns some of the samples [n], numbered anew."""
        place = self.sample.new_full((len(self.lower),), -1)
        place[samples] = torch.arange(len(samples), device=place.device)
        kept = (place[self.sample] >= 0).nonzero()[:, 0]
        sample = place[self.sample[kept]]
        alpha = None if self.alpha is None else self.alpha[kept]
        return Margins(
            self.lower[samples], self.root.select(samples), sample, self.other[kept], self.index[kept], alpha
        )


def alpha_margins(
    graph: Graph,
    params: Params,
    box: Box,
    labels: Tensor,
    *,
    known: Tensor | None = None,
    effort: Effort = FULL_EFFORT,
    how: Search | None = None,
    rounding: Rounding | None = None,
) -> Margins:
    """Lower bounds [N, classes] of ``logit[label] - logit[j]`` over the box, float64; 0 at j = label.

    As ``linear.crown_margins``, with slopes optimised for every open class over the same boxes; then, for samples with
    a class that is not above ``how.target``, over boxes whose unstable neurons have slopes of their own. Never below
    ``known``; NaN stays NaN. The box and ``params``, which hold float32 values, are float64. ``rounding``: bounds of
    what is computed in its arithmetic; then ``known`` must be, too.
    """
    how = how or Search(deadline=effort.deadline)
    network = Network(graph, params, {k: v.float() for k, v in params.items()}, rounding)
    if known is None:
        known = interval.margins(graph, params, box, labels, rounding=rounding)
    with torch.no_grad():
        boxes = linear.intermediate_boxes(graph, params, box, effort, rounding)
    return alpha_forms(network, boxes, known, MarginForms(labels, known.shape[1]), effort=effort, how=how)


def alpha_forms(
    network: Network, boxes: Mapping[str, Box], known: Tensor, forms: Forms, *, effort: Effort, how: Search
) -> Margins:
    """Lower bounds [N, R] of forms, not below ``known``: slopes optimised over ``boxes``, then over tightened ones.

    ``boxes``: of ``linear.intermediate_boxes``, with the network's rounding, for which ``known`` holds, too. Forms that
    ``known`` leaves open at 0 are bounded, tightened boxes only for samples with one open at ``how.target``.
    """
    last = network.graph.output.name
    with torch.no_grad():
        root = Root.on(network, boxes, last)
    sample, other = forms.open(known, 0.0).nonzero(as_tuple=True)
    found = _optimised(Margins(known, root, sample, other, root.unstable()[sample], None), forms, how)
    rows = forms.open(found.lower, how.target)[sample, other].nonzero()[:, 0]
    late = how.deadline is not None and time.perf_counter() >= how.deadline
    if len(rows) == 0 or late or how.box_steps == 0:
        return found
    left = torch.unique(sample[rows])
    with torch.no_grad():
        whole = dict(boxes)
        loose = {name: Box(b.center[left], b.radius[left]) for name, b in boxes.items()}
        for name, tight in tightened_boxes(network, loose, how.box_steps, effort).items():
            box = whole[name]
            whole[name] = Box(
                box.center.index_copy(0, left, tight.center), box.radius.index_copy(0, left, tight.radius)
            )
        root = Root.on(network, whole, last)
    index = root.unstable()[sample[rows]]
    alpha = found.slopes(rows).gather(1, index)
    return _optimised(Margins(found.lower, root, sample[rows], other[rows], index, alpha), forms, how)


def _optimised(start: Margins, forms: Forms, how: Search) -> Margins:
    """Margins whose rows are optimised from where they are."""
    root, lower, alpha = start.root, start.lower.clone(), start.index.new_zeros(start.index.shape, dtype=torch.float32)
    for part in parts(len(start.sample), batch_of(root), alpha.device):
        sample, other = start.sample[part], start.other[part]
        some = form_problems(forms, sample, other, start.index[part])
        found = optimise(root, some, None if start.alpha is None else start.alpha[part], None, how)
        alpha[part] = found.alpha
        old = lower[sample, other]
        # a comparison with NaN is false: a NaN of either bound survives
        lower[sample, other] = torch.where((old >= found.lower) | torch.isnan(old), old, found.lower)
    return replace(start, lower=lower, alpha=alpha)


def form_problems(forms: Forms, sample: Tensor, form: Tensor, index: Tensor) -> Problems:
    """Problems without splits: forms [B] of samples [B] with variables ``index`` [B, U]."""
    return Problems(sample, Rows(forms.rows(sample, form)[:, None]), index, torch.zeros_like(index, dtype=torch.int8))
