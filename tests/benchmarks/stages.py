"""Images per second of every stage of a verification, each on the images that the stages before it left open."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.alpha import Margins, Search, alpha_margins
from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.verification.attack import attack
from cactus_ray.verification.branch import Budget, branch
from cactus_ray.verification.engine import CactusEngine
from cactus_ray.verification.soundness import Batch, Model, proved
from cactus_ray.verification.verdict import VerificationSettings

Clock = Callable[[], float]


class Stages:
    """The stages of one batch; each says which of the images that it sees it decides, and keeps what later ones need.

    As the cascade runs them, with its default settings, but every stage sees whole batches and nothing is checked.
    """

    def __init__(self, graph: Graph, params: Params, batch: Batch, nodes: int) -> None:
        self.model, self.batch, self.settings = Model.of(graph, params), batch, VerificationSettings()
        self.rounding = Rounding.of(graph, self.model.double, self.settings.arithmetic)
        self.engine = CactusEngine(graph, self.model.double, self.rounding)
        self.budget = Budget(nodes, seconds=1e9, iterations=-(-self.settings.alpha_iterations // 2))
        classes = graph.shapes(params)[graph.output.name][0]
        self.lower = torch.full((len(batch), classes), -torch.inf, dtype=torch.float64, device=self.model.device)
        self.margins: tuple[list[int], Margins] | None = None

    def clean(self, positions: list[int]) -> Tensor:
        part = self.batch.select(positions)
        with torch.no_grad():
            return forward(self.model.graph, self.model.single, part.images).argmax(1) != part.labels

    def attack(self, positions: list[int]) -> Tensor:
        part, how = self.batch.select(positions), self.settings
        return attack(self.model, part, steps=how.attack_steps, restarts=how.restarts, seed=0)[1] < 0

    def _ball(self, part: Batch) -> interval.Box:
        return interval.ball(part.images.double(), part.epsilon, part.domain)

    def _keep(self, positions: list[int], part: Batch, lower: Tensor) -> Tensor:
        self.lower[positions] = lower
        return proved(lower, part.labels)

    def ibp(self, positions: list[int]) -> Tensor:
        part = self.batch.select(positions)
        with torch.no_grad():
            return self._keep(positions, part, self.engine.interval_margins(self._ball(part), part.labels))

    def crown(self, positions: list[int]) -> Tensor:
        part = self.batch.select(positions)
        with torch.no_grad():
            found = self.engine.linear_margins(self._ball(part), part.labels, known=self.lower[positions])
        return self._keep(positions, part, found)

    def alpha(self, positions: list[int]) -> Tensor:
        part, how = self.batch.select(positions), Search(self.settings.alpha_iterations)
        found = alpha_margins(
            self.model.graph, self.model.double, self._ball(part), part.labels,
            known=self.lower[positions], how=how, rounding=self.rounding,
        )  # fmt: skip
        self.margins = positions, found
        return self._keep(positions, part, found.lower)

    def branch(self, positions: list[int]) -> Tensor:
        assert self.margins is not None
        seen, margins = self.margins
        chosen = torch.tensor([seen.index(p) for p in positions], device=self.model.device)
        outcomes = branch(self.model, self.batch.select(positions), margins.select(chosen), self.budget)
        return torch.tensor([not outcome.reason for outcome in outcomes])


NAMES = {"clean": "clean", "attack": "attack", "IBP": "ibp", "CROWN": "crown", "alpha": "alpha", "branch": "branch"}


def measure(
    graph: Graph, params: Params, images: Tensor, labels: Tensor, arguments: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """Per stage: images that it saw and decided, and quartiles of images per second over repeated runs of the way."""
    batch = Batch.of(images.float(), labels, range(len(images)), arguments.epsilon, (0.0, 1.0))
    wait = torch.cuda.synchronize if images.device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    counts: dict[str, tuple[int, int]] = {}
    with exact_arithmetic(images.device):
        for turn in range(arguments.repeats + 1):
            work, left = Stages(graph, params, batch, arguments.nodes), list(range(len(batch)))
            for name, method in NAMES.items():
                if not left:
                    break
                wait()
                begun = clock()
                decided = getattr(work, method)(left)
                wait()
                if turn:  # the first is the warm-up
                    seconds[name].append(clock() - begun)
                counts[name] = len(left), int(decided.sum())
                left = [p for p, done in zip(left, decided.tolist(), strict=True) if not done]
    return [
        {
            "stage": name, "images": counts[name][0], "decided": counts[name][1],
            "repeats": len(seconds[name]),
            "images_per_second": [counts[name][0] / q for q in reversed(quartiles(seconds[name]))],
        }
        for name in NAMES if seconds[name]
    ]  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")


def table(rows: list[dict[str, Any]]) -> str:
    """Lines: median [quartiles]."""
    lines = [f"{'stage':8} {'images':>6} {'decided':>7} {'images per second':>28} repeats"]
    for row in rows:
        low, middle, high = row["images_per_second"]
        rate = f"{middle:.4g} [{low:.4g}, {high:.4g}]"
        lines.append(f"{row['stage']:8} {row['images']:6} {row['decided']:7} {rate:>28} {row['repeats']:7}")
    return "\n".join(lines)
