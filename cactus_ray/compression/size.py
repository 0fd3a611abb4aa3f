"""Sizes by counting: an idealised number of bits, and multiply-accumulates."""

from __future__ import annotations

import math

import torch

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.materialize import Compressed
from cactus_ray.compression.stored import Factored, Stored, Weight

BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def ideal_bits(compressed: Compressed) -> int:
    """Bits of all tensors by this rule, without any file format around them.

    A tensor of n values of b bits (32, 16, or those of its integer code) costs the least of: ``n * b``; ``nz * b + n``
    (the nz nonzero values and a bit mask); ``nz * (b + g)`` (the nonzero values and their distances, each in the
    ``g = ceil(log2(d + 1))`` bits that the largest distance d needs). An integer weight adds 32 bits per scale (the
    scales of an integer bias follow from those) and b per zero point, a quantiser of activations 40: its scale and zero
    point; a codebook its entries of 32 bits, 16 where they are whole. A weight of several parts costs those, and
    32 bits per scale and 16 per multiple.
    """
    quantisers = sum(node.op == "quantize" for node in compressed.graph.nodes)
    return 40 * quantisers + sum(_tensor_bits(stored) for stored in compressed.stored.values())


def _tensor_bits(stored: Weight) -> int:
    if isinstance(stored, Factored):
        own = 32 * stored.scale.numel() + 16 * stored.multiple.numel() * bool((stored.multiple != 1).any())
        return own + sum(_part_bits(part) for part in stored.parts.values())
    return _part_bits(stored)


def _part_bits(stored: Stored) -> int:
    bits = stored.bits if stored.bits is not None else BITS[stored.kind]
    n = stored.values.numel()
    positions = stored.values.flatten().nonzero().flatten()
    nonzero = positions.numel()
    gap_bits = 0
    if nonzero:
        largest = int(torch.diff(positions, prepend=torch.tensor([-1])).max())
        gap_bits = math.ceil(math.log2(largest + 1))
    scales = 32 * stored.scale.numel() if stored.scale is not None and stored.bits != 32 else 0
    zero_points = 0 if stored.zero_point is None else bits * stored.zero_point.numel()
    table = 0 if stored.table is None else 8 * stored.table.element_size() * stored.table.numel()
    return min(n * bits, nonzero * bits + n, nonzero * (bits + gap_bits)) + scales + zero_points + table


def macs(graph: Graph, params: Params) -> int:
    """Multiply-accumulates of convolutions and linear layers for one sample, zeros included."""
    return sum(macs_of(graph, params).values())


def macs_of(graph: Graph, params: Params) -> dict[str, int]:
    """The same of each of these layers, by name."""
    shapes = graph.shapes(params)
    return {
        node.name: params[f"{node.name}.weight"].numel()
        * (math.prod(shapes[node.name][1:]) if node.op == "conv2d" else 1)
        for node in graph.weighted()
    }
