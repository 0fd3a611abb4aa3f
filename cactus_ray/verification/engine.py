"""What the cascade asks of a bound engine, and our own engine's answers.

An engine is bound to one network. All engines answer the same calls, so that one set of contract tests holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cactus_ray import __version__
from cactus_ray.bounds import alpha, interval, linear
from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.rows import Rows
from cactus_ray.errors import UserError
from cactus_ray.verification.verdict import ENGINES


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a certificate records of an engine. ``self_test``: what it did on a fixed toy network."""

    name: str
    version: str
    self_test: str | None = None


class Engine(Protocol):
    """Bounds of one network. Margins are lower bounds [N, classes] of ``logit[label] - logit[j]``, 0 at j = label.

    All are sound in real arithmetic over ``box``, the input boxes of N samples in the dtype of the network's tensors;
    NaN proves nothing. With ``known`` margins no answer is below them, and classes whose known margin is positive are
    not bounded again.
    """

    @property
    def info(self) -> EngineInfo:
        """Name, version and self-test of the engine."""
        ...

    def interval_margins(self, box: Box, labels: Tensor) -> Tensor:
        """Margins by interval bounds, the last linear layer merged with the differences."""
        ...

    def linear_margins(
        self, box: Box, labels: Tensor, *, known: Tensor | None = None, effort: Effort = linear.FULL_EFFORT
    ) -> Tensor:
        """Margins by linear bounds (CROWN). Engines may spend more than ``effort.rows`` and ``effort.deadline`` say."""
        ...

    def alpha_margins(
        self,
        box: Box,
        labels: Tensor,
        *,
        known: Tensor | None = None,
        effort: Effort = linear.FULL_EFFORT,
        iterations: int = 20,
    ) -> Tensor:
        """Margins by linear bounds whose slopes take at most ``iterations`` gradient steps (alpha-CROWN)."""
        ...

    def margins_over(self, boxes: Mapping[str, Box], labels: Tensor) -> Tensor:
        """Margins by linear bounds over given sound boxes of the input and of every node that a ReLU reads."""
        ...


@dataclass(frozen=True, slots=True)
class CactusEngine:
    """The bounds of ``cactus_ray.bounds``; with ``rounding`` of what is computed in its arithmetic."""

    graph: Graph
    params: Params
    rounding: Rounding | None = None

    @property
    def info(self) -> EngineInfo:
        """Our own name and version."""
        return EngineInfo("cactus-ray", __version__)

    def interval_margins(self, box: Box, labels: Tensor) -> Tensor:
        """See ``interval.margins``."""
        return interval.margins(self.graph, self.params, box, labels, rounding=self.rounding)

    def linear_margins(
        self, box: Box, labels: Tensor, *, known: Tensor | None = None, effort: Effort = linear.FULL_EFFORT
    ) -> Tensor:
        """See ``linear.crown_margins``."""
        return linear.crown_margins(
            self.graph, self.params, box, labels, known=known, effort=effort, rounding=self.rounding
        )

    def alpha_margins(
        self,
        box: Box,
        labels: Tensor,
        *,
        known: Tensor | None = None,
        effort: Effort = linear.FULL_EFFORT,
        iterations: int = 20,
    ) -> Tensor:
        """See ``alpha.alpha_margins``."""
        how = alpha.Search(iterations=iterations, deadline=effort.deadline)
        found = alpha.alpha_margins(
            self.graph, self.params, box, labels, known=known, effort=effort, how=how, rounding=self.rounding
        )
        return found.lower

    def margins_over(self, boxes: Mapping[str, Box], labels: Tensor) -> Tensor:
        """One backward pass over relaxations on these boxes; nothing is tightened."""
        relaxed = linear.Relaxed.on(self.graph, self.params, boxes, self.graph.output.name, self.rounding)
        center = boxes[self.graph.nodes[0].name].center
        classes = self.graph.shapes(self.params)[self.graph.output.name][0]
        eye = torch.eye(classes, dtype=center.dtype, device=center.device)
        lower = relaxed.lower_bounds(Rows(eye[labels][:, None] - eye))
        return lower.scatter(1, labels[:, None], 0.0)


def bind(name: str, graph: Graph, params: Params, rounding: Rounding | None = None) -> Engine:
    """The engine of that name (one of ``ENGINES``), bound to a network. Only our own charges ``rounding``.

    Raises UserError where auto_LiRPA is wanted and not installed or weights have radii, UnsupportedGraphError where it
    cannot bound the network.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}; expected one of {', '.join(ENGINES)}")
    if name == "cactus":
        return CactusEngine(graph, params, rounding)
    if rounding is not None and rounding.radii:
        raise UserError(f"engine {name!r} does not know weights up to a radius; expected engine cactus for a family")
    from cactus_ray.verification import lirpa  # only who asks for it needs it installed

    return lirpa.LirpaEngine(graph, params)


def info(name: str) -> EngineInfo:
    """What certificates record of the engine of that name. Raises UserError where it is not installed."""
    if name == "auto_lirpa":
        from cactus_ray.verification import lirpa

        return lirpa.info()
    return EngineInfo("cactus-ray", __version__)
