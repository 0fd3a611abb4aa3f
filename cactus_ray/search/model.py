"""What a sampler with a model is shown of a long study: the newest trials and the non-dominated ones.

TPE sorts all trials by dominance whenever it is asked, and a Gaussian process inverts a matrix of them: the time of an
ask would grow without end. What was measured long ago and is dominated says little about where to look next.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

Array = npt.NDArray[np.float64]


class Shown:
    """At most ``limit`` numbers of finished trials: half of them at most non-dominated and feasible ones (of more, the
    newest), the others the newest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.newest: deque[int] = deque(maxlen=limit)
        self.front: list[int] = []
        self.losses: Array | None = None

    def add(self, number: int, losses: Sequence[float] | None) -> None:
        """A trial ended. ``losses``: its objectives, smaller is better; None if it has none or is not feasible."""
        self.newest.append(number)
        if losses is None:
            return
        row = np.asarray(losses, dtype=float)
        rows = np.empty((0, row.size)) if self.losses is None else self.losses
        if _dominates(rows, row).any():
            return
        kept = np.flatnonzero(~_dominates(row, rows))
        self.front = [self.front[i] for i in kept] + [number]
        self.losses = np.vstack([rows[kept], row])

    def numbers(self) -> frozenset[int]:
        leading = sorted(self.front)[-(self.limit // 2) :]
        others = [n for n in reversed(self.newest) if n not in set(leading)]
        return frozenset([*leading, *others[: self.limit - len(leading)]])


def _dominates(better: Array, worse: Array) -> npt.NDArray[np.bool_]:
    return np.asarray((better <= worse).all(axis=1) & (better < worse).any(axis=1))


class ModelStorage(InMemoryStorage):  # type: ignore[misc]  # optuna is not type-checked here
    """Optuna's storage in memory; while ``shown`` is set, finished trials with other numbers are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: Container[int] | None = None

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As the interface says."""
        shown = self.shown
        if shown is None:
            return super().get_all_trials(study_id, deepcopy, states)  # type: ignore[no-any-return]
        trials: list[Any] = super().get_all_trials(study_id, False, states)
        seen = [t for t in trials if not t.state.is_finished() or t.number in shown]
        return copy.deepcopy(seen) if deepcopy else seen
