"""What one level of a network leaves to the next, sample by sample.

Hints choose where a search starts and what is tried first. Nothing is concluded from them: whatever they hold, points
are replayed, and bounds computed, on the level's own tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Hint:
    """``nearest``: the point [C, H, W] float32 with the smallest margin that is known. ``certified``: by any bound."""

    nearest: Tensor | None = None
    certified: bool = False


Hints = dict[int, Hint]
"""By index of the sample."""
