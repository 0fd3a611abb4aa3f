"""Integer inference (``w8a8``): activations rounded to 256 codes with static scales, weights to 8 bits, biases to 32.

Quantisers stand where values are produced: behind the image (or its normalisation), and behind every layer (and its
ReLU) that another layer reads. A layer then reads codes, and a runtime may compute it in integers. The logits stay
floating-point numbers. Zero is a code of every quantiser, so padding and dead channels stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Node, Params, apply_node, quantize
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.quantizer import LARGEST_SUM, LAYOUT, READS_CODES, reach, refuse_twice, sources
from cactus_ray.compression.quantize import dequantize, quantize_with, step
from cactus_ray.errors import UserError

CODES = (0, 255)
COVERED = 0.999
"""Share of the values on either side that a quantiser covers; the rest saturates, which costs less than wider steps."""
LARGEST_BIAS = 2**30
"""Of the code of a bias: it leaves room for the products."""


@dataclass(frozen=True, slots=True)
class Integers:
    """Codes (int8, or int32 for a bias) and one float32 scale per output channel."""

    codes: Tensor
    scale: Tensor

    @property
    def tensor(self) -> Tensor:
        """The float32 tensor that stands for them where a runtime computes with floating-point numbers."""
        return dequantize(self.codes, self.scale)


def place_quantisers(graph: Graph) -> Graph:
    """The graph with a quantiser, not yet calibrated, behind every value that a layer of ``READS_CODES`` reads.

    Only these readers see the rounded values; flattening and max pooling on the way work on codes.
    """
    nodes: dict[str, Node] = {n.name: n for n in graph.nodes}
    chosen: set[str] = set()
    for node in graph.nodes:
        if node.op in READS_CODES:
            for name in node.inputs:
                while nodes[name].op in LAYOUT:
                    name = nodes[name].inputs[0]
                chosen.add(name)
    found: list[Node] = []
    taken = set(nodes)
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        swaps = node.op in READS_CODES or node.op in LAYOUT
        found.append(replace(node, inputs=tuple(renamed.get(i, i) if swaps else i for i in node.inputs)))
        if node.name in chosen:
            name = f"{node.name}_codes"
            while name in taken:
                name += "_"
            taken.add(name)
            renamed[node.name] = name
            found.append(Node(name, "quantize", (node.name,)))
    return Graph(tuple(found), graph.input_shape)


@torch.no_grad()
def integer_network(
    graph: Graph, params: Params, images: Tensor, domain: tuple[float, float]
) -> tuple[Graph, dict[str, Integers]]:
    """The network without batch norm as integers: its graph with quantisers, and the codes of weights and biases.

    Scales and zero points of activations cover 0 and nearly all values (``COVERED``) on images [N, C, H, W], computed
    behind the quantisers before; those of the image cover its whole domain. Weights are symmetric per output channel.
    Deterministic. Raises UserError where a sum of a layer would not fit 32 bits, UnsupportedGraphError where a value
    would be rounded twice without a layer in between.
    """
    graph = place_quantisers(graph)
    ranges: dict[str, Box] = {}  # what does not depend on the layers: the image's domain, behind its normalisation too
    waiting = {name: len(readers) for name, readers in graph.consumers().items()}
    values: dict[str, Tensor] = {}
    codes: dict[str, Integers] = {}
    nodes: list[Node] = []
    behind = sources(graph)
    calibrated: dict[str, Node] = {}
    for node in graph.nodes:
        inputs = [values[i] for i in node.inputs]
        if node.op == "input":
            shape = (1, *graph.input_shape)
            ranges[node.name] = Box.between(torch.full(shape, domain[0]), torch.full(shape, domain[1]))
            values[node.name] = images
        elif node.op == "quantize":
            known = ranges.get(node.inputs[0])
            ends = _bulk(inputs[0]) if known is None else (float(known.lower.min()), float(known.upper.max()))
            node = replace(node, attributes=_scale(*ends))
            calibrated[node.name] = node
            values[node.name] = quantize(node, inputs[0])
        else:
            if node.op == "scale_shift" and node.inputs[0] in ranges:
                ranges[node.name] = interval.step(node, params, [ranges[node.inputs[0]]])
            source = behind[node.name][0]
            if node.op in ("conv2d", "linear") and source is not None:
                found = _layer(node, params, calibrated[source.name])
                codes |= found
                params = {**params, **{name: integers.tensor for name, integers in found.items()}}
            values[node.name] = apply_node(node, params, inputs)
        nodes.append(node)
        for name in node.inputs:  # as in calibration.recalibrate
            waiting[name] -= 1
            if waiting[name] == 0:
                values.pop(name, None)
    placed = Graph(tuple(nodes), graph.input_shape)
    refuse_twice(placed)
    return placed, codes


def _bulk(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest of the values but for the share ``1 - COVERED`` at either end."""
    flat = values.flatten()
    cut = round((1 - COVERED) * flat.numel())
    return float(flat.kthvalue(cut + 1).values), float(flat.kthvalue(flat.numel() - cut).values)


def _scale(smallest: float, largest: float) -> dict[str, float | int]:
    """Attributes of a quantiser whose codes reach from ``smallest`` to ``largest``, both moved to include 0."""
    low, high = min(smallest, 0.0), max(largest, 0.0)
    width = float(torch.tensor((high - low) / (CODES[1] - CODES[0]), dtype=torch.float32))
    scale = width if width > 1e-12 else 1.0  # a value that is always 0
    zero_point = min(max(round(-low / scale), CODES[0]), CODES[1])
    return {"scale": scale, "zero_point": zero_point, "low": CODES[0], "high": CODES[1]}


def _layer(node: Node, params: Params, source: Node) -> dict[str, Integers]:
    """Codes of a layer's weight and, in units of both its scales, of its bias."""
    weight, bias = params[f"{node.name}.weight"], params.get(f"{node.name}.bias")
    scale = step(weight.double())
    if bias is not None:  # a channel of tiny weights must leave its bias room in 32 bits
        scale = torch.maximum(scale, bias.double().abs() / (source["scale"] * LARGEST_BIAS))
    single = scale.float()
    codes = quantize_with(weight, single, 8)
    found = {f"{node.name}.weight": Integers(codes, single)}
    sums = codes.double().abs().flatten(1).sum(1) * reach(source)
    if bias is not None:
        units = source_units(source, single)
        whole = torch.round(bias.double() / units.double())
        found[f"{node.name}.bias"] = Integers(whole.to(torch.int32), units)
        sums = sums + whole.abs()
    if float(sums.max()) > LARGEST_SUM:
        raise UserError(
            f"level w8a8: a sum of layer {node.name!r} reaches {float(sums.max()):.4g} in units of its scales; expected"
            f" at most {LARGEST_SUM}, what 32 bits hold"
        )
    return found


def source_units(source: Node, scale: Tensor) -> Tensor:
    """Scale of a layer's bias: that of its inputs times those of its weights, in float32."""
    return torch.tensor(source["scale"], dtype=torch.float32) * scale
