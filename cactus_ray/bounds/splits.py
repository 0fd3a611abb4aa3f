"""Sub-problems of branch and bound: boxes whose ReLUs are split, relaxed with free slopes and multipliers.

A split fixes the sign of a ReLU's input. Its half of the input's box makes the ReLU linear, and its constraint enters
the bound with a Lagrange multiplier >= 0 (beta-CROWN, Wang et al. 2021, Theorem 3.1). Whatever the slopes in
[slope_of(node), 1] and the multipliers >= 0 are, the bounds are sound, so searching for them may round as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cactus_ray.bounds.graph import RELUS, Graph, Node, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Relaxed
from cactus_ray.bounds.quantizer import QuantizeRelaxation
from cactus_ray.bounds.relaxation import MaxPoolRelaxation, Relaxation, ReluRelaxation, relax
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.rows import Rows, Shape


@dataclass(frozen=True, slots=True)
class Network:
    """A graph with its tensors (float32 values) in float64, which decides, and in float32, which searches.

    ``rounding``: the arithmetic that bounds are to hold in; None: real numbers.
    """

    graph: Graph
    params: Params
    single: Params
    rounding: Rounding | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return next(iter(self.single.values())).device


@dataclass(frozen=True, slots=True)
class Neurons:
    """The ReLUs before a node as one flat vector of ``size`` neurons: (node, shape, first, end) of each, in order."""

    nodes: tuple[tuple[Node, Shape, int, int], ...]

    @property
    def size(self) -> int:
        return self.nodes[-1][3] if self.nodes else 0

    def span(self, name: str) -> tuple[int, int]:
        """First and end position of a ReLU node's neurons."""
        return next((first, end) for node, _, first, end in self.nodes if node.name == name)

    @staticmethod
    def of(graph: Graph, shapes: Mapping[str, Shape], last: str) -> Neurons:
        """All (leaky) ReLUs of the graph that come before node ``last`` or are it."""
        found: list[tuple[Node, Shape, int, int]] = []
        for node in graph.nodes:
            if node.op in RELUS:
                shape, first = shapes[node.inputs[0]], found[-1][3] if found else 0
                found.append((node, shape, first, first + torch.Size(shape).numel()))
            if node.name == last:
                break
        return Neurons(tuple(found))


@dataclass(frozen=True, slots=True)
class SplitRelu(ReluRelaxation):
    """A ReLU's relaxation, plus ``multiplier * x`` [B, *shape] with a sign that makes the product <= 0 on the half.

    ``reach`` [B, *shape]: the largest |x|, for the rounding of that product; 0 where there is no multiplier.
    ``seen`` collects ``name`` and the coefficients [B, S, *shape] of the forms over relu(x) that were pulled.
    """

    multiplier: Tensor | None = None
    reach: Tensor | None = None
    name: str = ""
    seen: list[tuple[str, Tensor]] | None = None

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """As ReluRelaxation's; with the Lagrangian term of the split constraints."""
        if self.seen is not None:
            self.seen.append((self.name, rows.dense(shape).coefficients))
        pulled, constant = ReluRelaxation.pull(self, rows, shape)
        if self.multiplier is not None and self.reach is not None:
            pulled = Rows(pulled.coefficients + pulled.over(self.multiplier), pulled.origin)
            # the sum is rounded in units of its terms, which may be larger than what is left and charged below
            slack = 8 * torch.finfo(self.reach.dtype).eps * (self.multiplier.abs() * self.reach).flatten(1).sum(1)
            constant = constant - slack[:, None]
        return pulled, constant

    def select(self, samples: Tensor) -> SplitRelu:
        """The relaxation of some samples of the batch."""
        return replace(
            self,
            lower_slope=self.lower_slope[samples],
            upper_slope=self.upper_slope[samples],
            intercept=self.intercept[samples],
            multiplier=None if self.multiplier is None else self.multiplier[samples],
            reach=None if self.reach is None else self.reach[samples],
        )


@dataclass(frozen=True, slots=True)
class Root:
    """n samples' networks up to node ``last``, relaxed on sound boxes of every node before it, float64.

    ``low``, ``high`` [n, F + 1]: bounds of every ReLU's input; the last column is padding (0).
    """

    relaxed: Relaxed
    single: Params
    neurons: Neurons
    low: Tensor
    high: Tensor

    @staticmethod
    def on(network: Network, boxes: Mapping[str, Box], last: str) -> Root:
        """``boxes`` as of ``linear.intermediate_boxes``, with the network's rounding."""
        relaxed = Relaxed.on(network.graph, network.params, boxes, last, network.rounding)
        others = {name: r for name, r in relaxed.relaxations.items() if not isinstance(r, ReluRelaxation)}
        relaxed = replace(relaxed, relaxations=others)  # ReLUs are relaxed anew in every problem
        neurons = Neurons.of(network.graph, relaxed.shapes, last)
        padding = relaxed.box.center.new_zeros(len(relaxed.box.center), 1)
        inputs = [boxes[node.inputs[0]] for node, *_ in neurons.nodes]
        low = torch.cat([*(b.lower.flatten(1) for b in inputs), padding], 1)
        high = torch.cat([*(b.upper.flatten(1) for b in inputs), padding], 1)
        return Root(relaxed, network.single, neurons, low, high)

    def __len__(self) -> int:
        return len(self.low)

    def select(self, samples: Tensor) -> Root:
        """Some of the samples."""
        return replace(self, relaxed=self.relaxed.select(samples), low=self.low[samples], high=self.high[samples])

    def unstable(self) -> Tensor:
        """Flat positions [n, U] of the ReLUs that are not linear on their boxes, padded with F."""
        loose = (self.low < 0) & (self.high > 0)
        order = loose.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        width = int(loose.sum(1).max()) if len(self) else 0
        order = order[:, :width]
        return order.masked_fill(~loose.gather(1, order), self.neurons.size)


@dataclass(frozen=True, slots=True)
class Problems:
    """B sub-problems: a lower bound of one linear form over a sample's box, on one side of every split.

    ``sample`` [B] int64: which of the root's samples. ``rows``: one form each [B, 1, ...], float64. ``index`` [B, U]:
    flat positions of the ReLUs that have variables, padded with F. ``sign`` [B, U] int8: 1 where the ReLU's input is
    >= 0, -1 where it is <= 0, 0 where it is not split. ``mixable`` [B, K]: outputs that the rows may weigh anew, by
    numbers >= 0, where a bound of any such form will do; None: the rows are what is asked.
    """

    sample: Tensor
    rows: Rows
    index: Tensor
    sign: Tensor
    mixable: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample)

    def select(self, which: Tensor) -> Problems:
        """Some of them."""
        origin = None if self.rows.origin is None else self.rows.origin[which]
        rows = Rows(self.rows.coefficients[which], origin)
        mixable = None if self.mixable is None else self.mixable[which]
        return Problems(self.sample[which], rows, self.index[which], self.sign[which], mixable)


@dataclass(frozen=True, slots=True)
class Region:
    """Problems relaxed in one precision, ready for any slopes and multipliers."""

    base: Relaxed
    neurons: Neurons
    rows: Rows
    index: Tensor
    sign: Tensor
    free: Tensor
    slopes: Tensor
    upper: tuple[tuple[Tensor, Tensor], ...]
    reach: Tensor
    mixable: Tensor | None

    @staticmethod
    def of(root: Root, problems: Problems) -> Region:
        """In float64. ``free`` [B, U]: the ReLUs that are not linear yet; ``slopes`` [B, F + 1]: CROWN's lower ones."""
        low, high = halves(root, problems)
        at_low, at_high = low.gather(1, problems.index), high.gather(1, problems.index)
        found: list[ReluRelaxation] = []
        base = root.relaxed.select(problems.sample)
        relaxations = dict(base.relaxations)
        for node, shape, first, end in root.neurons.nodes:
            sides = [side[:, first:end].view(-1, *shape) for side in (low, high)]
            relaxation = relax(node, Box.between(*sides))
            assert isinstance(relaxation, ReluRelaxation)
            found.append(relaxation)
            for name, other in relaxations.items():  # quantisers know what is left of a ReLU (which rounds nothing)
                if isinstance(other, QuantizeRelaxation) and node.op == "relu" and node.name in other.node.inputs:
                    relaxations[name] = other.over(Box.between(*(side.clamp(min=0.0) for side in sides)))
        return Region(
            replace(base, relaxations=relaxations),
            root.neurons,
            problems.rows,
            problems.index,
            problems.sign.to(low.dtype),
            (at_low < 0) & (at_high > 0),
            torch.cat([*(r.lower_slope.flatten(1) for r in found), low.new_zeros(len(low), 1)], 1),
            tuple((r.upper_slope, r.intercept) for r in found),
            torch.maximum(at_low.abs(), at_high.abs()),
            problems.mixable,
        )

    def single(self, params: Params) -> Region:
        """The region in float32, for searching; ``params`` are the network's tensors in float32."""
        return Region(
            cast(self.base, params),
            self.neurons,
            Rows(self.rows.coefficients.float(), self.rows.origin),
            self.index,
            self.sign.float(),
            self.free,
            self.slopes.float(),
            tuple((slope.float(), intercept.float()) for slope, intercept in self.upper),
            self.reach.float(),
            self.mixable,
        )

    def select(self, which: Tensor) -> Region:
        """Some of the problems."""
        origin = None if self.rows.origin is None else self.rows.origin[which]
        return Region(
            self.base.select(which),
            self.neurons,
            Rows(self.rows.coefficients[which], origin),
            self.index[which],
            self.sign[which],
            self.free[which],
            self.slopes[which],
            tuple((slope[which], intercept[which]) for slope, intercept in self.upper),
            self.reach[which],
            None if self.mixable is None else self.mixable[which],
        )

    def start(self) -> Tensor:
        """CROWN's slopes of the ReLUs with variables [B, U]."""
        return self.slopes.gather(1, self.index)

    @staticmethod
    def multiplier(sign: Tensor, beta: Tensor) -> Tensor:
        """What a split ReLU's input is multiplied by, a term that is <= 0 on the half, for ``beta`` >= 0."""
        return -sign * beta  # sign 1 means -x <= 0 on the half, sign -1 means x <= 0

    def at(self, alpha: Tensor, beta: Tensor, seen: list[tuple[str, Tensor]] | None = None) -> Relaxed:
        """The relaxation with lower slopes ``alpha`` where a ReLU is free, and multipliers ``beta`` where it is split.

        Both [B, U], in the region's precision; slopes between ``slopes.least_slope`` and 1, multipliers >= 0, or the
        bounds are not sound. ``seen``: see SplitRelu.
        """
        slopes = self.slopes.scatter(1, self.index, torch.where(self.free, alpha, self.start()))
        multiplier = torch.zeros_like(self.slopes).scatter(1, self.index, self.multiplier(self.sign, beta))
        reach = torch.zeros_like(self.slopes).scatter(1, self.index, self.sign.abs() * self.reach)
        relaxations: dict[str, Relaxation] = dict(self.base.relaxations)
        for (node, shape, first, end), (upper, intercept) in zip(self.neurons.nodes, self.upper, strict=True):
            slope, weight, size = (flat[:, first:end].view(-1, *shape) for flat in (slopes, multiplier, reach))
            relaxations[node.name] = SplitRelu(slope, upper, intercept, weight, size, node.name, seen)
        return replace(self.base, relaxations=relaxations)


def halves(root: Root, problems: Problems) -> tuple[Tensor, Tensor]:
    """Bounds [B, F + 1] of the ReLUs' inputs: the sample's, cut at 0 where a ReLU is split."""
    low, high = root.low[problems.sample], root.high[problems.sample]
    at_low, at_high = low.gather(1, problems.index), high.gather(1, problems.index)
    at_low = torch.where(problems.sign > 0, at_low.clamp(min=0), at_low)
    at_high = torch.where(problems.sign < 0, at_high.clamp(max=0), at_high)
    return low.scatter(1, problems.index, at_low), high.scatter(1, problems.index, at_high)


def cast(relaxed: Relaxed, params: Params) -> Relaxed:
    """The relaxation in float32; its ReLUs are replaced anyway."""
    box = Box(relaxed.box.center.float(), relaxed.box.radius.float())
    others: dict[str, Relaxation] = {}
    for name, r in relaxed.relaxations.items():
        if isinstance(r, MaxPoolRelaxation):
            others[name] = MaxPoolRelaxation(r.below, r.above, r.slope.float(), r.intercept.float())
        elif isinstance(r, QuantizeRelaxation):
            others[name] = r.map(Tensor.float)
    charges = {name: charge.float() for name, charge in relaxed.charges.items()}
    wide = {name: spread.single() for name, spread in relaxed.spreads.items()}
    return replace(relaxed, params=params, box=box, relaxations=others, charges=charges, spreads=wide)
