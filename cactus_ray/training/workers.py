"""Data-parallel training: what the loop needs to know about its fellow workers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Workers(Protocol):
    """A group of workers that train one network, each on its own part of every batch."""

    @property
    def rank(self) -> int:
        """This worker's number, 0 <= rank < size."""
        ...

    @property
    def size(self) -> int:
        """How many workers there are, at least 1."""
        ...

    def mean_(self, tensors: list[Tensor], /) -> None:
        """Replace every float tensor, in place, by its mean over the workers, all of them in one message.

        Every worker calls it with the same shapes in the same order.
        """
        ...


class Alone:
    """One worker: every tensor is its own mean."""

    rank, size = 0, 1

    def mean_(self, tensors: list[Tensor], /) -> None:
        pass
