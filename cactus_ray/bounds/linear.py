"""Linear bounds propagated backward (CROWN: Zhang et al. 2018; Xu et al. 2020), over boxes of every node.

Sound in real arithmetic, with a ``Rounding`` in floating point. Decisions are taken in float64: give float64 tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.adjoint import pull_linear, unbroadcast
from cactus_ray.bounds.graph import RELUS, Graph, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.quantizer import on_input, relax_quantize
from cactus_ray.bounds.relaxation import RELAXED, Relaxation, relax
from cactus_ray.bounds.rounding import UNDERFLOW, Rounding
from cactus_ray.bounds.rows import Rows, Shape, contract, unit_rows
from cactus_ray.bounds.spread import Spread, spreads

CPU_BYTES, DEVICE_BYTES = 1 << 22, 1 << 30
"""Bytes of one dense coefficient tensor: on a CPU what its caches hold (several times faster), else memory."""
LEAST_ROWS = 32
"""Rows that are bounded at once however large their node is; fewer would only cost overhead."""


def memory_of(device: torch.device) -> int:
    """Bytes that one tensor of coefficients may take."""
    return CPU_BYTES if device.type == "cpu" else DEVICE_BYTES


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work goes into the bounds of the nodes before a ReLU, a max pooling or a quantiser.

    ``intermediate``: "ibp", or "crown": CROWN on unstable neurons, intersected with IBP.
    ``rows``: neurons of one node and sample that CROWN bounds (the loosest first); the others keep IBP's bounds.
    ``deadline``: value of ``time.perf_counter`` from which on nodes keep IBP's bounds; None: no limit.
    ``memory``: bytes of one tensor of coefficients; None: chosen by the device.
    """

    intermediate: str = "crown"
    rows: int = 2048
    deadline: float | None = None
    memory: int | None = None


FULL_EFFORT = Effort()


def crown_margins(
    graph: Graph,
    params: Params,
    box: Box,
    labels: Tensor,
    *,
    known: Tensor | None = None,
    effort: Effort = FULL_EFFORT,
    rounding: Rounding | None = None,
) -> Tensor:
    """Lower bounds [N, classes] of ``logit[label] - logit[j]`` over the box; 0 at j = label.

    Never below ``known``, lower bounds that the caller already has (default: ``interval.margins``); classes whose
    known bound is positive are not bounded again. NaN stays NaN. The tensors' dtype decides the precision.
    ``rounding``: bounds of what is computed in its arithmetic, the rounding of the bounds themselves included; then
    ``known`` must be, too.
    """
    if known is None:
        known = interval.margins(graph, params, box, labels, rounding=rounding)
    wanted = ~(known > 0)
    wanted = wanted.scatter(1, labels[:, None], False)
    samples = wanted.any(1).nonzero()[:, 0]
    if len(samples) == 0:
        return known
    boxes = intermediate_boxes(graph, params, Box(box.center[samples], box.radius[samples]), effort, rounding)
    labels, wanted = labels[samples], wanted[samples]
    order = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)

    def differences(chunk: Tensor, start: int, stop: int) -> Rows:
        others = order[chunk, start:stop]
        rows = box.center.new_zeros(*others.shape, wanted.shape[1])
        rows.scatter_(2, labels[chunk, None, None].expand(-1, others.shape[1], 1), 1.0)
        return Rows(rows.scatter_add_(2, others[..., None], rows.new_full((*others.shape, 1), -1.0)))

    relaxed = Relaxed.on(graph, params, boxes, graph.output.name, rounding)
    found = box.center.new_full(wanted.shape, -torch.inf)
    for chunk, start, stop, bound in relaxed.sweep(wanted.sum(1), differences, effort.memory):
        found[chunk[:, None], order[chunk, start:stop]] = bound
    old = known[samples]
    # a comparison with NaN is false: a NaN of either bound survives
    better = torch.where((old >= found) | torch.isnan(old), old, found)
    return known.index_put((samples,), torch.where(wanted, better, old))


def intermediate_boxes(
    graph: Graph, params: Params, box: Box, effort: Effort = FULL_EFFORT, rounding: Rounding | None = None
) -> dict[str, Box]:
    """Boxes of all nodes but the output, by name, over the input box.

    Nodes are boxed in order, each from the tightened boxes before it. Where a node that is not linear reads one whose
    interval bounds are not exact, CROWN bounds its unstable neurons and the two are intersected. ``rounding``: boxes of
    what is computed in its arithmetic.
    """
    boxes: dict[str, Box] = {}
    mixing, readers = interval.mixing(graph), graph.consumers()
    for node in graph.nodes[:-1]:
        inputs = [boxes[i] for i in node.inputs]
        if node.op == "input":
            boxes[node.name] = box if rounding is None else rounding.seal(box)
        else:
            step = interval.step if rounding is None else rounding.step
            boxes[node.name] = step(node, params, inputs)
        kinds = {reader.op for reader in readers[node.name]}
        kinds -= {"quantize"} if node.op in RELUS else set()  # bounded from what the ReLU reads
        late = effort.deadline is not None and time.perf_counter() >= effort.deadline
        if effort.intermediate == "crown" and mixing[node.name] == 2 and kinds & {*RELAXED} and not late:
            looseness = looseness_of(boxes[node.name], pooled=bool(kinds & {"max_pool2d", "quantize"}))
            relaxed = Relaxed.on(graph, params, boxes, node.name, rounding)
            boxes[node.name] = tighten(relaxed, boxes[node.name], looseness, effort)
            if rounding is not None:
                boxes[node.name] = rounding.seal(boxes[node.name])
    return boxes


def looseness_of(box: Box, pooled: bool) -> Tensor:
    """What tighter bounds of a neuron are worth [N, F]: 0 for a stable ReLU; other readers want them all narrow."""
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    return upper - lower if pooled else torch.minimum(upper, -lower).clamp(min=0)


def tighten(relaxed: Relaxed, box: Box, looseness: Tensor, effort: Effort, how: Bounder | None = None) -> Box:
    """The box of the relaxed network's last node, intersected with linear bounds of the neurons of looseness > 0.

    ``how`` bounds the forms of a part of the network; None: ``Relaxed.lower_bounds``. Stops at the deadline. Where the
    intersection is empty, which only rounding can cause, and where the linear bound is NaN, the neuron keeps its
    bounds of before.
    """
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    order = looseness.argsort(dim=1, descending=True, stable=True)
    counts = (looseness > 0).sum(1).clamp(max=effort.rows)
    shape = tuple(box.center.shape[1:])

    def both_signs(chunk: Tensor, start: int, stop: int) -> Rows:
        return unit_rows(order[chunk, start:stop], shape, lower.dtype).with_negatives()

    new_lower, new_upper = lower.clone(), upper.clone()
    for chunk, start, stop, bound in relaxed.sweep(counts, both_signs, effort.memory, how):
        place = chunk[:, None], order[chunk, start:stop]
        # padding is left out, or a sample's bounds would depend on its neighbours in the batch
        own = torch.arange(start, stop, device=counts.device) < counts[chunk, None]
        low, high = bound[:, : stop - start], -bound[:, stop - start :]
        new_lower[place] = torch.where(own & (low > lower[place]), low, lower[place])
        new_upper[place] = torch.where(own & (high < upper[place]), high, upper[place])
        if effort.deadline is not None and time.perf_counter() >= effort.deadline:
            break
    empty = new_lower > new_upper
    new_lower, new_upper = torch.where(empty, lower, new_lower), torch.where(empty, upper, new_upper)
    return Box.between(new_lower.view_as(box.center), new_upper.view_as(box.center))


Bounder = Callable[["Relaxed", Rows], Tensor]
"""Lower bounds [N, S] of forms over the last node's output."""


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The network up to node ``last`` with every node that is not linear replaced by linear bounds, for N input boxes.

    ``charges`` [N, *shape] by node: what rounding, and weights within radii, cost per unit of a coefficient of that
    node's output. ``spreads`` by node: what may be taken back of the latter.
    """

    graph: Graph
    params: Params
    last: str
    box: Box
    shapes: Mapping[str, Shape]
    relaxations: Mapping[str, Relaxation]
    charges: Mapping[str, Tensor] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @staticmethod
    def on(
        graph: Graph, params: Params, boxes: Mapping[str, Box], last: str, rounding: Rounding | None = None
    ) -> Relaxed:
        """``boxes`` holds sound boxes of the input and of every node before ``last``, made with ``rounding``."""
        shapes = {name: tuple(b.center.shape[1:]) for name, b in boxes.items()}
        found: dict[str, Relaxation] = {}
        for node in graph.nodes:
            if node.op in RELAXED:
                box = boxes[node.inputs[0]]
                if node.op == "quantize":
                    widening = rounding.widening(node, box) if rounding else 0.0
                    found[node.name] = relax_quantize(node, box, widening, independent=on_input(graph, node))
                else:
                    found[node.name] = relax(node, box)
            if node.name == last:
                break
        charges = {} if rounding is None else rounding.charges(graph, params, boxes)
        wide = {} if rounding is None else spreads(graph, rounding.radii, boxes)
        return Relaxed(graph, params, last, boxes[graph.nodes[0].name], shapes, found, charges, wide)

    def select(self, samples: Tensor) -> Relaxed:
        """The same for some of the samples."""
        box = Box(self.box.center[samples], self.box.radius[samples])
        some = {name: relaxation.select(samples) for name, relaxation in self.relaxations.items()}
        charges = {name: charge[samples] for name, charge in self.charges.items()}
        wide = {name: spread.select(samples) for name, spread in self.spreads.items()}
        return Relaxed(self.graph, self.params, self.last, box, self.shapes, some, charges, wide)

    def lower_bounds(self, rows: Rows) -> Tensor:
        """Lower bounds [N, S] of linear forms over the last node's output."""
        return self.smallest(*self.input_rows(rows))

    def smallest(self, rows: Rows, bound: Tensor) -> Tensor:
        """What ``input_rows`` gave, at its smallest over the input box [N, S]; rounding of the input is charged."""
        radius = self.box.radius
        if self.charges:
            radius = radius + self.charges[self.graph.nodes[0].name]
        center, radius = rows.overs(self.box.center, radius)
        return bound + contract(rows.coefficients, center) - contract(rows.absolute().coefficients, radius)

    def input_rows(self, rows: Rows, visit: Callable[[Rows], object] | None = None) -> tuple[Rows, Tensor]:
        """Forms over the input and constants [N, S] that are below the given forms over the last node's output.

        The charges of all nodes but the input's are inside the constants. ``visit`` sees the forms at every node.
        """
        pending = {self.last: rows}
        bound = rows.coefficients.new_full(rows.coefficients.shape[:2], -UNDERFLOW if self.charges else 0.0)
        for node in reversed(self.graph.nodes):
            if node.name not in pending or node.op == "input":
                continue
            rows = pending.pop(node.name)
            if visit is not None:
                visit(rows)
            if node.name in self.charges:
                bound = bound - rows.absolute().dot(self.charges[node.name])
            shape, above = self.shapes[node.inputs[0]], rows
            if node.op == "add":
                constant: Tensor | float = 0.0
            elif node.name in self.relaxations:
                rows, constant = self.relaxations[node.name].pull(rows, shape)
            else:
                rows, constant = pull_linear(node, self.params, rows, shape)
            bound = bound + constant
            if node.name in self.spreads:
                rows, credit = self.spreads[node.name].improve(above, rows, shape)
                bound = bound + credit
            for source in node.inputs:
                target = self.shapes[source]
                part = unbroadcast(rows, target) if node.op == "add" else rows
                pending[source] = pending[source].plus(part, target) if source in pending else part
        return pending[self.graph.nodes[0].name], bound

    def width(self, rows: Rows) -> int:
        """The most coefficients that a form has on its way to the input, for one set of forms like the others."""
        numbers = [math.prod(self.shapes[self.graph.nodes[0].name])]
        self.input_rows(rows, lambda some: numbers.append(some.coefficients[0].numel()))
        return max(numbers)

    def sweep(
        self,
        counts: Tensor,
        make: Callable[[Tensor, int, int], Rows],
        memory: int | None,
        how: Bounder | None = None,
    ) -> Iterator[tuple[Tensor, int, int, Tensor]]:
        """Bound the first ``counts[n]`` [N] forms of every sample, in chunks that fit, by ``how`` or ``lower_bounds``.

        Yields (samples [n], start, stop, lower bounds of ``make(samples, start, stop)``). Samples with fewer forms
        than ``stop`` are padded with whatever ``make`` gives; their bounds are sound, too.
        """
        how = how or Relaxed.lower_bounds
        memory = memory or memory_of(counts.device)
        most = int(counts.max()) if len(counts) else 0
        if most == 0:
            return
        first = counts.argmax()[None]
        largest = self.select(first).width(make(first, 0, 1)) * self.box.center.element_size()
        rows = max(LEAST_ROWS, memory // largest)
        width = min(most, rows)
        by_count = counts.argsort(descending=True, stable=True)
        for start in range(0, most, max(width, 1)):
            active = by_count[counts[by_count] > start]
            for chunk in torch.split(active, max(1, rows // width)):
                stop = min(start + width, int(counts[chunk].max()))
                yield chunk, start, stop, how(self.select(chunk), make(chunk, start, stop))
