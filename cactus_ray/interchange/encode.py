"""How weights are laid out in the file so that compression saves bytes: packed integers, bit masks, gaps.

Tensors of the same encoding are laid end to end as one stream, so the operators that unpack it are paid once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from cactus_ray.compression.stored import Stored

ENCODINGS = ("dense", "mask", "gaps4", "gaps6", "gaps8")
VALUE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}

# Serialised bytes of the unpacking operators: once per stream, and once per tensor in it (measured on written files).
_STREAM_BYTES = {"dense": 0, "mask": 220, "gaps4": 400, "gaps6": 400, "gaps8": 200}
_TENSOR_BYTES = 85
_UNPACK_BYTES = 140  # bits to integers: dense integers below 8 bits, and the values of a sparse stream of them


@dataclass(frozen=True, slots=True)
class Gaps:
    """Positions as distances: ``positions = cumsum(distances)``; ``source`` is -1 for a filler, whose value is 0."""

    distances: NDArray[np.uint8]
    source: NDArray[np.int64]


def value_bits(stored: Stored) -> int:
    """Bits of one stored value, without scales."""
    return stored.bits if stored.bits is not None else VALUE_BITS[stored.kind]


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The low ``bits`` bits of every value, least significant first, as one stream of bytes (padded with zeros)."""
    if bits == 8:
        return values
    fields = np.unpackbits(values[:, None], axis=1, bitorder="little", count=bits)
    return np.packbits(fields, bitorder="little")


def gaps(positions: NDArray[np.int64], bits: int, multiple: int = 1) -> Gaps:
    """Distances between increasing positions in ``bits`` bits each; the first is the first position itself.

    A distance beyond ``2^bits - 1`` is bridged by fillers. Fillers of distance 0 pad the length to a multiple
    of ``multiple``.
    """
    largest = 2**bits - 1
    distances = np.diff(positions, prepend=0)
    bridges = np.maximum(distances - 1, 0) // largest
    ends = np.cumsum(bridges + 1) - 1  # where the real entries lie among the fillers
    count = int(ends[-1]) + 1 if len(ends) else 0
    padded = -(-count // multiple) * multiple
    found = np.zeros(padded, np.uint8)
    found[:count] = largest
    found[ends] = distances - bridges * largest
    source = np.full(padded, -1, np.int64)
    source[ends] = np.arange(len(positions))
    return Gaps(found, source)


def choose(weights: Mapping[str, Stored]) -> dict[str, str]:
    """The encoding of every tensor that makes the file smallest, operators included. Deterministic.

    For every set of encodings that the file may use, each tensor takes its cheapest one; the cheapest set wins.
    """
    costs = {name: _costs(stored) for name, stored in weights.items()}
    integers = {value_bits(stored) for stored in weights.values()} - {8, 16, 32}
    best: tuple[float, dict[str, str]] | None = None
    for allowed in chain.from_iterable(combinations(ENCODINGS, k) for k in range(1, len(ENCODINGS) + 1)):
        pick = {name: min(allowed, key=cost.__getitem__) for name, cost in costs.items()}
        total = sum(costs[name][encoding] for name, encoding in pick.items())
        for encoding in set(pick.values()):
            total += _STREAM_BYTES[encoding] + (_UNPACK_BYTES if integers else 0)
        if best is None or total < best[0]:
            best = (total, pick)
    return {} if best is None else best[1]


def _costs(stored: Stored) -> dict[str, float]:
    """Bytes of one tensor by encoding: its data and its own operators."""
    bits = value_bits(stored)
    positions = np.flatnonzero(stored.values.float().numpy())
    n, nonzero = stored.values.numel(), len(positions)
    distances = np.diff(positions, prepend=0)
    costs = {"dense": n * bits / 8 + (0 if bits == 32 else 30 if bits in (8, 16) else _TENSOR_BYTES)}
    costs["mask"] = n / 8 + nonzero * bits / 8 + _TENSOR_BYTES
    for width in (4, 6, 8):
        fillers = int((np.maximum(distances - 1, 0) // (2**width - 1)).sum())
        costs[f"gaps{width}"] = (nonzero + fillers) * (bits + width) / 8 + _TENSOR_BYTES
    return costs
