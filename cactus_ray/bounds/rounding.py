"""What rounding can do to a network and to its bounds: charges that make both hold in floating point.

And what weights that are known up to a radius can do: they are charged in the same way (*Families*).

Standard model (Higham 2002, Sec. 2.2 and 3.1): an operation gives the exact result times (1 + d), |d| <= u, plus at
most the smallest normal number. A sum of n products and a bias, in any order, with or without fused multiply-add,
pairwise, blocked or split over threads, is within ``gamma_m (|W| |x| + |b|)`` of the exact one, ``m = n + 1`` and
``gamma_m = m u / (1 - m u)``.

*Deployed arithmetic.* Node k of the deployed network computes ``y_k = f_k(inputs as computed) + d_k``,
``|d_k| <= e_k = gamma_m(u) S_k``, ``S_k = |W| |x|_max + |b|``, where |x|_max is the largest magnitude in the box of the
inputs *as computed*. Every box here is one of values as computed, so by induction the charge covers the next node.

*Our own arithmetic* (float64, unit v) is charged by the same terms, with ``g = gamma_M(v)`` and M at least the number
of terms of any sum below:
- interval step: ``W c + b`` and ``|W| r`` are each within ``g S_k`` of their exact values.
- backward step through node k with computed coefficients A (lower bound of forms ``A y_k``): the computed ``A W`` is
  ``A W + E``, ``|E| <= g |A| |W|``, so ``A y_k = A (W x + b + d_k) >= (A W + E) x + A b - |E| |x|_max - |A| e_k``, and
  ``|E| |x|_max`` and the rounding of the constant ``A b`` are together at most ``g |A| S_k``. The matrix that goes on
  is the computed one, so errors do not compound; nothing is asked of A but that it is the one that was used.
- a ReLU multiplies coefficients by slopes in [0, 1] and adds intercepts times coefficients: with A' the coefficients
  that go on to its input z, at most ``g |A'| |z|_max``, charged at z. Max pooling adds up coefficients of a window: at
  most ``g |A| |x|_max`` of the window. A node with several readers adds their coefficients: at most ``g |A| |y|_max``.
- the input: ``A c - |A| r`` is within ``2 g |A| |x|_max``; additions of the constants cost g times the terms above.
So a node costs ``|A| k S_k`` with ``k = gamma_m(u) + 8 g`` (the sum of the above is below 4 g, and the charge itself is
rounded). Relaxations pay for their own rounding (``relaxation.py``).

*Fusion.* A runtime may fold a per-channel scale, a batch norm or an addition into the layer before it. The nodes of
such a chain are charged with one m, the sum of theirs; then the charge of the chain, ``gamma_m`` times the absolute
values of its terms, covers every way of computing it in at most m roundings per term.

*Families.* With radii R, bounds hold for every network whose weights are ``W + D``, ``|D| <= R``, biases unchanged:
such a member computes ``y_k = W x + b + D x + d_k`` with ``|D x| <= R |x|_max`` and
``|d_k| <= gamma_m(u) ((|W| + R) |x|_max + |b|)``, so a node costs ``R |x|_max`` more, and its S_k is that of
``|W| + R``. |x|_max is taken over the box of the inputs as any member computes them: every box before was widened by
the same charge. That sum is rounded by at most g times itself and is multiplied by ``1 + k``, which is more. Linear
bounds take a part of the charge back where it varies with the input (``spread.py``).

*Quantisers.* A quantiser turns a rounding error near a tie into a whole step, so its inputs are moved outward by all of
them before (``widening``): the roundings of ``value / scale + zero_point``, each of which is relative to a term of at
most ``quantizer.MOST_UNITS`` scales near a tie. A layer behind quantisers may run as one kernel of integers, whose sums
are exact: then its charge stands for the roundings of the scales instead (``quantizer.FUSED_ROUNDINGS``).

*Range.* Overflow is excluded: where ``max S_k`` is not below 2^126 the charge is infinite and nothing is proved.
Underflow, also where results or operands are flushed to zero, is charged by absolute terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds import interval, quantizer
from cactus_ray.bounds.arithmetic import ARITHMETICS
from cactus_ray.bounds.graph import RELUS, Graph, Node, Params, batch_norm_affine, slope_of
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.spread import check_radii, widened

LIMIT = 2.0**126
UNDERFLOW = 2.0**-800
"""More than all that float64 underflow can do to a bound while magnitudes stay below ``LIMIT``."""
AFFINE = ("conv2d", "linear", "batch_norm", "scale_shift", "avg_pool2d", "add")
FOLDED = ("batch_norm", "scale_shift", "add")
"""Operators that a runtime may fold into the affine node before them."""


def gamma(count: float, unit: float) -> float:
    """Relative error of ``count`` (>= 0) roundings of the given unit; infinity where the model gives none."""
    return count * unit / (1 - count * unit) if count * unit < 0.5 else math.inf


@dataclass(frozen=True, slots=True)
class NodeRounding:
    """Constants of one node: ``relative`` is k above, ``own`` is 8 g.

    ``offset``: k |b|, broadcasts over the output. ``gain``, ``shift``: ``S_k <= gain * max |x| + shift``.
    ``tiny``: absolute error per unit of ``1 + largest + max |x|``, ``largest`` the largest weight.
    """

    relative: float
    own: float
    offset: Tensor | float
    gain: float
    shift: float
    largest: float
    tiny: float


@dataclass(frozen=True, slots=True)
class Rounding:
    """The charges of one network in one arithmetic. ``unit``: that of our own arithmetic.

    ``shared``: nodes whose coefficients are added up, or scaled by a ReLU, without being charged as a layer.
    ``radii``: how far weights may be from the given ones, by the name of the tensor; absent: they are exact.
    """

    nodes: Mapping[str, NodeRounding]
    unit: float
    shared: frozenset[str]
    radii: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, params: Params, arithmetic: str, radii: Mapping[str, Tensor] | None = None) -> Rounding:
        """For ``arithmetic`` of ``ARITHMETICS``; our own precision is that of ``params``. KeyError for another name.

        ``radii`` (>= 0, shape and dtype of the tensors) of weights of linear and convolutional nodes: the bounds hold
        for every network whose weights are that close. ValueError for radii of anything else.
        """
        deployed, radii = ARITHMETICS[arithmetic], radii or {}
        check_radii(graph, params, radii)
        largest = {k: v.abs() + radii[k] if k in radii else v for k, v in params.items()}
        own = torch.finfo(next(iter(params.values())).dtype)
        counts, shapes, readers = _chained(graph, params), graph.shapes(params), graph.consumers()
        fixed_point = {n.name: quantizer.fixed_point_error(graph, n) if deployed else 0.0 for n in graph.nodes}
        nodes = {}
        for node in graph.nodes:
            terms = max(math.prod(shapes[node.name]), *_fans(node, params)) + 16 + 4 * len(graph.nodes)
            inner = 8 * gamma(terms, own.eps / 2)
            # the charge is itself computed: its factors are rounded, each product and sum by at most gamma(terms)
            relative = (gamma(counts[node.name], deployed) + inner) * (1 + inner)
            smallest = 2.0**-126 if deployed else own.tiny
            factors = relative, inner, 4 * terms * smallest
            found = _constants(node, largest, len(shapes[node.name]), factors)
            nodes[node.name] = replace(found, offset=found.offset + fixed_point[node.name])
        shared = frozenset(
            n.name
            for n in graph.nodes
            if len(readers[n.name]) > 1 or n.op == "max_pool2d" or any(r.op in RELUS for r in readers[n.name])
        )
        return Rounding(nodes, own.eps / 2, shared, radii)

    def step(self, node: Node, params: Params, inputs: list[Box]) -> Box:
        """Like ``interval.step``, but the box contains what is computed, for inputs [N, ...] as computed."""
        terms = self.nodes[node.name]
        if node.op in AFFINE:  # |W| r + k (|W| |x| + |b|) = |W| (r + k |x|) + k |b|
            wide = [Box(x.center, x.radius + terms.relative * magnitude(x)) for x in inputs]
            out = interval.step(node, params, wide)
            radius = out.radius + self._constant(terms, inputs, out.center)
            spread = self._spread(node, [magnitude(x) for x in inputs])
            return Box(out.center, radius if spread is None else radius + spread)
        if node.op == "quantize":
            out = self.stairs(node, inputs[0])
            return self.seal(Box(out.center, out.radius + terms.relative * magnitude(out)))
        out = interval.step(node, params, inputs)
        if node.op == "leaky_relu":
            out = Box(out.center, out.radius + terms.relative * slope_of(node) * magnitude(inputs[0]))
        return self.seal(out)

    def widening(self, node: Node, box: Box) -> Tensor:
        """By how much a value in the box of a quantiser's input may seem another one to it [N, *shape]."""
        near_ties: float = quantizer.MOST_UNITS * node["scale"]
        return self.nodes[node.name].relative * (magnitude(box) + near_ties)

    def stairs(self, node: Node, box: Box) -> Box:
        """What a quantiser may give for any value in the box of its input, its product with the scale taken exactly."""
        return interval.step(node, {}, [Box(box.center, box.radius + self.widening(node, box))])

    def seal(self, box: Box) -> Box:
        """The box widened by the rounding of its two ends and of their change to center and radius."""
        return Box(box.center, box.radius + 16 * self.unit * magnitude(box))

    def charge(self, node: Node, params: Params, inputs: list[Box]) -> Tensor | None:
        """What a backward bound loses at the node per unit of a coefficient of its output [N, *shape]; None: nothing.

        ``inputs``: boxes of the node's inputs as computed; for the input node its own box.
        """
        terms = self.nodes[node.name]
        sizes = [magnitude(x) for x in inputs]
        if node.op in AFFINE:
            radius = interval.step(node, params, [Box(torch.zeros_like(s), s) for s in sizes]).radius
            charge = terms.relative * radius + self._constant(terms, inputs, radius)
            return charge if (spread := self._spread(node, sizes)) is None else charge + spread
        if node.op == "input":
            return terms.own * sizes[0]
        if node.op == "quantize":  # the product with the scale; the rounding of slopes and intercepts
            out = magnitude(self.stairs(node, inputs[0]))
            return terms.relative * out + terms.own * (sizes[0] + out + float(node["scale"]))
        if node.op == "max_pool2d":
            return terms.own * F.max_pool2d(sizes[0], node["kernel"], node["stride"], node["padding"])
        share = terms.own if node.name in self.shared else 0.0
        if node.op == "leaky_relu":
            share += terms.relative * slope_of(node)
        if share == 0:
            return None
        return share * (sizes[0].flatten(1) if node.op == "flatten" else sizes[0])

    def charges(self, graph: Graph, params: Params, boxes: Mapping[str, Box]) -> dict[str, Tensor]:
        """Charges of all nodes whose inputs are boxed; ``boxes`` of values as computed, from ``step`` or tighter."""
        found = {}
        for node in graph.nodes:
            sources = node.inputs or (node.name,)
            if all(s in boxes for s in sources):
                charge = self.charge(node, params, [boxes[s] for s in sources])
                if charge is not None:
                    found[node.name] = charge
        return found

    def _spread(self, node: Node, sizes: list[Tensor]) -> Tensor | None:
        """``(1 + k) R |x|`` for inputs of at most the given sizes: what weights within their radii change; rounded up.

        With ``k (|W| |x| + |b|)`` this covers the rounding of every such network, too. None without radii.
        """
        radius = self.radii.get(f"{node.name}.weight")
        if radius is None:
            return None
        return (1 + self.nodes[node.name].relative) * widened(node, radius, sizes[0])

    def _constant(self, terms: NodeRounding, inputs: list[Box], like: Tensor) -> Tensor:
        """``k |b|`` and the absolute terms; infinite where a sum may overflow (a NaN stays one)."""
        largest = torch.stack([magnitude(x).flatten(1).amax(1) for x in inputs]).amax(0)
        absolute = terms.tiny * (1 + terms.largest + largest)
        safe = ~(terms.gain * largest + terms.shift >= LIMIT)
        absolute = torch.where(safe, absolute, torch.full_like(absolute, torch.inf))
        return absolute.view(-1, *[1] * (like.dim() - 1)) + terms.offset


def magnitude(box: Box) -> Tensor:
    """Largest absolute value in the box, elementwise."""
    return box.center.abs() + box.radius


def _fans(node: Node, params: Params) -> tuple[int, int]:
    """The most terms of one sum of the node, forward and backward."""
    if node.op in ("conv2d", "linear"):
        weight = params[f"{node.name}.weight"]
        groups = node["groups"] if node.op == "conv2d" else 1
        return weight[0].numel(), weight.numel() // weight.shape[1] // groups
    kernel = math.prod(node.attributes.get("kernel", (1,)))
    return kernel, 2 * kernel


def _roundings(node: Node, params: Params) -> int:
    """Roundings that a term of the node's result goes through at most, in any order."""
    match node.op:
        case "conv2d" | "linear" | "avg_pool2d":  # an average: the sum, the reciprocal of the count, their product
            return _fans(node, params)[0] + 1
        case "scale_shift":
            return 2
        case "batch_norm":  # variance + eps, root, quotient, two products, two differences; one to spare
            return 8
        case "leaky_relu":  # the slope as a float32 constant, and the product
            return 2
        case "add":
            return 1
        case "quantize":
            return quantizer.QUANTISE_ROUNDINGS
    return 0


def _chained(graph: Graph, params: Params) -> dict[str, int]:
    """Roundings of every node, those of a chain that may be computed as one taken together."""
    group: dict[str, str] = {}
    for node in graph.nodes:
        group[node.name] = node.name
        if node.op in FOLDED:
            linked = {group[i] for i in node.inputs if graph[i].op in AFFINE}
            group = {name: node.name if g in linked else g for name, g in group.items()}
    codes = quantizer.on_codes(graph)
    total: dict[str, int] = {}
    for node in graph.nodes:
        fused = quantizer.FUSED_ROUNDINGS if node.name in codes else 0
        total[group[node.name]] = total.get(group[node.name], 0) + _roundings(node, params) + fused
    return {name: total[g] for name, g in group.items()}


def _constants(node: Node, params: Params, dimensions: int, factors: tuple[float, float, float]) -> NodeRounding:
    """The node's entry from its tensors; ``dimensions`` of its output, ``factors``: relative, own, tiny."""
    relative, own, tiny = factors
    offset: Tensor | float = 0.0
    gain, shift, largest = float(len(node.inputs)), 0.0, 1.0
    match node.op:
        case "conv2d" | "linear":
            weight = params[f"{node.name}.weight"].abs().flatten(1)
            gain, largest = float(weight.sum(1).max()), float(weight.max())
            if (bias := params.get(f"{node.name}.bias")) is not None:
                offset = bias.abs()
        case "scale_shift":
            gain = largest = float(params[f"{node.name}.scale"].abs().max())
            offset = params[f"{node.name}.shift"].abs()
        case "batch_norm":
            scale, _ = batch_norm_affine(node, params)
            mean, bias = params[f"{node.name}.running_mean"].abs(), params.get(f"{node.name}.bias")
            gain = largest = max(1.0, float(scale.abs().max()))
            offset = scale.abs() * mean if bias is None else scale.abs() * mean + bias.abs()
            shift = float(mean.max())
        case "avg_pool2d":
            gain = float(math.prod(node["kernel"]))
    if isinstance(offset, Tensor):
        shift += float(offset.max())
        offset = relative * offset
        if node.op != "linear":  # one number per channel; a linear layer's bias is one per last dimension
            offset = offset.view(-1, *[1] * (dimensions - 1))
    return NodeRounding(relative, own, offset, gain, shift, largest, tiny)
