"""Quantised activations: a value rounded to one of 256 codes and read back, ``(code - zero_point) * scale``.

``code = saturate(round_half_even(value / scale) + zero_point)``: ONNX's QuantizeLinear, then DequantizeLinear, with
constants that do not depend on the image. The function is a monotone staircase, so an interval goes through it exactly,
end by end; linear bounds pay half a step, and less where the box shows only a few steps or the saturation.

What is computed may lie on the other side of a tie than the exact value, which costs a whole step. So ends are moved
outward by all that rounding can do (``widening``) *before* they are rounded to codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, code_range, quantize
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rows import Rows, Shape, contract
from cactus_ray.errors import UnsupportedGraphError

LAYOUT = ("flatten", "max_pool2d")
"""Operators that hand codes on as they are."""
READS_CODES = ("conv2d", "linear", "avg_pool2d", "add")
"""Operators that a runtime may compute on codes."""
FUSED_ROUNDINGS = 8
"""Roundings per term of such an operator beside those of its sums: its weights, inputs and bias as products with their
scales, or in one kernel of integers the sum as a float, the product and quotient of the scales, and their product."""
QUANTISE_ROUNDINGS = 8
"""Roundings of ``value / scale + zero_point`` and of ``code * scale``, also where a reciprocal is multiplied."""
MOST_UNITS = 512.0
"""More units of the scale than any term of ``value / scale + zero_point`` has near a tie."""
LARGEST_SUM = 2**31 - 1
"""Of a layer's codes times codes of its inputs, and its bias: what a kernel of integers adds up in 32 bits."""
TRACE = 2.0**-30
"""Slope of lines that would better be constant."""
FIXED_POINT = 2.0**-20
"""Relative error of a sum of two codes in fixed-point arithmetic with 22 bits, and more."""


def has_quantisers(graph: Graph) -> bool:
    """Whether activations are quantised."""
    return any(node.op == "quantize" for node in graph.nodes)


def sources(graph: Graph) -> dict[str, tuple[Node | None, ...]]:
    """For every node, the quantiser behind each of its inputs where nothing but layout lies between, else None."""
    behind: dict[str, Node | None] = {}
    found: dict[str, tuple[Node | None, ...]] = {}
    for node in graph.nodes:
        found[node.name] = tuple(behind[i] for i in node.inputs)
        if node.op == "quantize":
            behind[node.name] = node
        else:
            behind[node.name] = found[node.name][0] if node.op in LAYOUT else None
    return found


def on_codes(graph: Graph) -> frozenset[str]:
    """The nodes of ``READS_CODES`` all of whose inputs are quantised."""
    behind = sources(graph)
    return frozenset(n.name for n in graph.nodes if n.op in READS_CODES and None not in behind[n.name])


def input_scales(graph: Graph) -> dict[str, float]:
    """Scale of the codes that each convolution and linear layer reads, for those that read codes."""
    behind = sources(graph)
    found = {node.name: behind[node.name][0] for node in graph.weighted()}
    return {name: float(source["scale"]) for name, source in found.items() if source is not None}


def on_input(graph: Graph, quantiser: Node) -> bool:
    """Whether nothing but elementwise operators stands between the input and a quantiser."""
    node = graph[quantiser.inputs[0]]
    while node.op in ("scale_shift", "batch_norm", "flatten"):
        node = graph[node.inputs[0]]
    return node.op == "input"


def reach(quantiser: Node) -> int:
    """The largest magnitude of a code, counted from the zero point."""
    return max(abs(end) for end in code_range(quantiser))


def fixed_point_error(graph: Graph, node: Node) -> float:
    """What fixed-point arithmetic may add to a sum of quantised inputs; 0 for any other node.

    A runtime may take codes times ratios of scales to the scale of the quantiser that follows.
    """
    behind = sources(graph)[node.name]
    if node.op != "add" or None in behind:
        return 0.0
    readers = graph.consumers()
    after = [m for reader in readers[node.name] for m in (reader, *readers[reader.name]) if m.op == "quantize"]
    steps = [float(q["scale"]) for q in (*behind, *after) if q is not None]
    return FIXED_POINT * MOST_UNITS * sum(steps)


def refuse_twice(graph: Graph) -> None:
    """Raises UnsupportedGraphError for a quantiser behind another with only ReLU, pooling or layout in between.

    A runtime may merge the two into one of another scale, which is another function.
    """
    behind: dict[str, Node | None] = {}
    for node in graph.nodes:
        before = behind[node.inputs[0]] if len(node.inputs) == 1 else None
        if node.op == "quantize":
            if before is not None and dict(before.attributes) != dict(node.attributes):
                raise UnsupportedGraphError(
                    f"quantiser {node.name!r} rounds what {before.name!r} has rounded already, with other numbers and"
                    " no layer in between; a runtime may merge the two"
                )
            behind[node.name] = node
        else:
            behind[node.name] = before if node.op in (*LAYOUT, "relu") else None


@dataclass(frozen=True, slots=True)
class QuantizeRelaxation:
    """``lower_slope * x + lower_intercept <= y <= upper_slope * x + upper_intercept``; all [B, *shape].

    ``y``: any value that is computed for x, which lies within ``widening`` [B, *shape] of x on the staircase of
    ``node``. Slopes lie in [0, 1].
    """

    node: Node
    widening: Tensor
    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor

    def pull(self, rows: Rows, shape: Shape) -> tuple[Rows, Tensor]:
        """Forms over the quantised values bounded from below by forms over x, and their constants [B, S]."""
        positive, negative = rows.coefficients.clamp(min=0), rows.coefficients.clamp(max=0)
        slopes, intercepts = (self.lower_slope, self.upper_slope), (self.lower_intercept, self.upper_intercept)
        lower, upper, below, above = rows.overs(*slopes, *intercepts)
        constant = contract(positive, below) + contract(negative, above)
        return Rows(positive * lower + negative * upper, rows.origin), constant

    def select(self, samples: Tensor) -> QuantizeRelaxation:
        """The relaxation of some samples of the batch."""
        return self.map(lambda t: t[samples])

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizeRelaxation:
        """The relaxation with every tensor changed by the same function."""
        lower = change(self.lower_slope), change(self.lower_intercept)
        upper = change(self.upper_slope), change(self.upper_intercept)
        return QuantizeRelaxation(self.node, change(self.widening), *lower, *upper)

    def over(self, box: Box) -> QuantizeRelaxation:
        """The relaxation on a part of its box."""
        return relax_quantize(self.node, box, self.widening)


def relax_quantize(
    node: Node, box: Box, widening: Tensor | float = 0.0, *, independent: bool = False
) -> QuantizeRelaxation:
    """Lines through the corners of the staircase's convex hull, the ones that leave less area on the box.

    With e the widening, y is at most ``Q(x + e)``, whose last corner on the box is ``(Q(u + e) - s/2 - e, Q(u + e))``:
    every line through it with a slope between 0 and that of the hull's edge on its left is above. That edge has slope 1
    (identity plus half a step), or less where the box begins in the lower saturation. Below likewise.

    ``independent``: the box is all that is known of its neurons, each of which can be at either end whatever the others
    do. Then nothing is tighter than a constant; lines keep a trace of a slope, which says where they are smallest.
    """
    step = node["scale"]
    e = torch.as_tensor(widening, dtype=box.center.dtype, device=box.center.device).expand_as(box.center)
    lower, upper = box.lower, box.upper
    highest, left = quantize(node, upper + e), quantize(node, lower + e)
    lowest, right = quantize(node, lower - e), quantize(node, upper - e)
    last, first = highest - step / 2 - e, lowest + step / 2 + e
    middle = (lower + upper) / 2
    one, zero = torch.ones_like(lower), torch.zeros_like(lower)
    # the slack of the intercepts below covers the rounding of these comparisons and quotients, too
    up = torch.where(left <= lower + e + step / 2, one, ((highest - left) / (last - lower)).clamp(0.0, 1.0))
    down = torch.where(right >= upper - e - step / 2, one, ((right - lowest) / (upper - first)).clamp(0.0, 1.0))
    if independent:
        above, below = up.clamp(max=TRACE), down.clamp(max=TRACE)
    else:
        above, below = torch.where(middle >= last, zero, up), torch.where(middle <= first, zero, down)
    above, below = torch.where(highest == left, zero, above), torch.where(lowest == right, zero, below)
    size = lower.abs() + upper.abs() + highest.abs() + lowest.abs() + step + e
    slack = 64 * torch.finfo(lower.dtype).eps * size
    broken = ~(torch.isfinite(lower) & torch.isfinite(upper) & torch.isfinite(e))
    return QuantizeRelaxation(
        node,
        e,
        below.masked_fill(broken, torch.nan),
        lowest - below * first - slack,
        above.masked_fill(broken, torch.nan),
        highest - above * last + slack,
    )
