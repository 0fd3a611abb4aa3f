"""How an ONNX file lays out a value that our graph holds in its own order: reshaping and transposing without layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class InputLayout(Exception):  # noqa: N818 - not an error: it asks for another reading of the file
    """A layer reads the network's input as maps of ``shape``, whose flat entry p is entry ``order[p]`` of the file's.

    Caught by the reader of the file, which starts again with an input of this layout; ``str`` says why that is needed.
    """

    def __init__(self, reason: str, shape: tuple[int, ...], order: Tensor) -> None:
        super().__init__(reason)
        self.shape, self.order = shape, order


@dataclass(frozen=True, slots=True)
class View:
    """A value of the file, for one sample: its entry ``i`` is the flat entry ``index[i]`` of our node ``node``.

    ``index`` (int64) has the value's shape in the file, with batch size 1; every entry of the node occurs once.
    """

    node: str
    index: Tensor

    @property
    def in_order(self) -> bool:
        """Whether the flat entries are those of the node, in its order."""
        return bool(torch.equal(self.index.flatten(), torch.arange(self.index.numel())))


def reshaped(index: Tensor, target: Sequence[int]) -> Tensor:
    """ONNX Reshape: 0 keeps a dimension, -1 is what remains. Raises ValueError where the sizes differ."""
    shape = [index.shape[i] if d == 0 and i < index.dim() else d for i, d in enumerate(target)]
    if shape.count(-1) > 1 or any(d < -1 for d in shape):
        raise ValueError(f"a shape {list(target)}")
    rest = math.prod(d for d in shape if d != -1)
    if -1 in shape and rest > 0:
        shape[shape.index(-1)] = index.numel() // rest
    if math.prod(shape) != index.numel():
        raise ValueError(f"{tuple(index.shape)} to {list(target)}")
    return index.reshape(shape)


def flattened(index: Tensor, axis: int) -> Tensor:
    """ONNX Flatten: two dimensions, parted before ``axis``."""
    return index.reshape(math.prod(index.shape[: axis if axis >= 0 else axis + index.dim()]), -1)


def permuted(index: Tensor, dims: Sequence[int] | None) -> Tensor:
    """ONNX Transpose; None reverses the dimensions."""
    return index.permute(*(dims if dims is not None else reversed(range(index.dim()))))


def squeezed(index: Tensor, axes: Sequence[int] | None) -> Tensor:
    """ONNX Squeeze; None removes every dimension of size 1. Raises ValueError for another size."""
    chosen = {a % index.dim() for a in axes} if axes is not None else {i for i, d in enumerate(index.shape) if d == 1}
    if any(index.shape[a] != 1 for a in chosen):
        raise ValueError(f"squeezing dimensions {sorted(chosen)} of {tuple(index.shape)}")
    return index.reshape([d for i, d in enumerate(index.shape) if i not in chosen])


def unsqueezed(index: Tensor, axes: Sequence[int]) -> Tensor:
    """ONNX Unsqueeze: ``axes`` count in the result."""
    rank = index.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        index = index.unsqueeze(axis)
    return index
