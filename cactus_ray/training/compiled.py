"""The passes that a step is made of, run as they are written or through ``torch.compile``.

Each is compiled on its own: attack step, clean pass, and certified loss. What changes from step to step are tensors,
so that no value of the schedules, mask or point asks for another compilation; shapes are fixed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics
from cactus_ray.bounds.interval import Box
from cactus_ray.config import TrainConfig
from cactus_ray.errors import ConfigError
from cactus_ray.training.attacks import SignStep, pgd, sign_step
from cactus_ray.training.losses import (
    CERTIFIED_LOSSES,
    EXPRESSIVE,
    TAIL_ATTACKED,
    CertifiedLoss,
    LossOptions,
    Region,
    Visitor,
    standard,
)

T = TypeVar("T")
_Found = tuple[Tensor, Statistics, dict[str, tuple[Tensor, Tensor]]]

BACKEND = "inductor"
AS_THEY_ARE = TAIL_ATTACKED | {"crown_ibp"}
"""The losses that are never compiled: the first draw from a generator, the weight of the last moves in the ramp."""
VARIANTS = 64
"""Most compilations of one pass in a run: members, stages, shares of the batch and the ascent have their own."""


class CleanLoss(Protocol):
    """``losses.standard``, or the same compiled."""

    def __call__(
        self, graph: Graph, params: Params, images: Tensor, labels: Tensor, statistics: Statistics
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Passes:
    """The attack (with the arguments of ``pgd``), the clean loss and the certified losses.

    ``begin`` is called before the first pass of every step.
    """

    attack: Callable[..., Tensor]
    standard: CleanLoss
    certified: Mapping[str, CertifiedLoss]
    begin: Callable[[], object] = lambda: None


AS_WRITTEN = Passes(pgd, standard, CERTIFIED_LOSSES)


def passes_of(train: TrainConfig, device: torch.device) -> Passes:
    """What ``train.compile`` asks for. Raises ConfigError where torch's compiler lacks the one that it calls."""
    if train.compile is None:
        return AS_WRITTEN
    if BACKEND == "inductor":
        needed = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(needed) is None:
            raise ConfigError("train.compile", train.compile, f"none: this machine has no C++ compiler {needed} (CXX)")
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise ConfigError("train.compile", train.compile, "none: this machine has no triton, which GPUs need")
    return compiled(device)


def compiled(device: torch.device) -> Passes:
    """The same passes through ``torch.compile``, each one whole graph: losses differ by rounding only.

    Forgets what was compiled in this process before. On CUDA they become CUDA graphs, whose outputs are overwritten in
    the next step: they are copied, and nothing of a step outlives ``begin``. That has never run on a GPU. The losses
    ``AS_THEY_ARE`` stay so, as does everything between the passes: masks, perturbations, optimiser.
    """
    torch.compiler.reset()  # or a long-lived process would keep all its runs' graphs, and reach torch's limit
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    cuda = device.type == "cuda"
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
    if cuda:
        options["mode"] = "reduce-overhead"
    keep = _copies if cuda else _as_it_is
    step: SignStep = torch.compile(sign_step, **options)
    clean, box = torch.compile(_clean, **options), torch.compile(_box, **options)
    losses = {k: f if k in AS_THEY_ARE else _certified(k, box, keep) for k, f in CERTIFIED_LOSSES.items()}

    def attack(*args: Any, step_size: float, start: Tensor, **options: Any) -> Tensor:
        size = torch.full((), step_size, dtype=start.dtype, device=start.device)
        return keep(pgd(*args, step_size=size, start=start, step=step, **options))

    def of_clean(graph: Graph, params: Params, images: Tensor, labels: Tensor, statistics: Statistics) -> Tensor:
        loss, found = keep(clean(graph, params, images, labels))
        statistics.update(found)
        return loss

    return Passes(attack, of_clean, losses, torch.compiler.cudagraph_mark_step_begin if cuda else AS_WRITTEN.begin)


def _clean(graph: Graph, params: Params, images: Tensor, labels: Tensor) -> tuple[Tensor, Statistics]:
    statistics: Statistics = {}
    return standard(graph, params, images, labels, statistics), statistics


def _box(
    kind: str, graph: Graph, params: Params, labels: Tensor, ball: tuple[Tensor, Tensor], point: Tensor | None,
    options: LossOptions, statistics: Statistics | None, visited: bool,
) -> _Found:  # fmt: skip
    """The loss, the statistics that it has replaced, and what a visitor would see, if there is one."""
    boxes: dict[str, tuple[Tensor, Tensor]] = {}
    used = None if statistics is None else dict(statistics)

    def visit(node: Node, box: Box) -> None:
        boxes[node.name] = box.center, box.radius

    loss = CERTIFIED_LOSSES[kind](
        graph, params, Region(labels, Box(*ball), point), options, statistics=used, visit=visit if visited else None
    )  # fmt: skip
    return loss, used if used is not None and kind in EXPRESSIVE else {}, boxes


def _certified(kind: str, box: Callable[..., _Found], keep: Callable[[_Found], _Found]) -> CertifiedLoss:
    """The certified loss of this kind by way of the compiled ``_box``."""

    def loss(
        graph: Graph, params: Params, region: Region, options: LossOptions, *,
        statistics: Statistics | None = None, visit: Visitor | None = None,
    ) -> Tensor:  # fmt: skip
        ball = region.ball.center, region.ball.radius
        found, replaced, boxes = keep(
            box(kind, graph, params, region.labels, ball, region.point, options, statistics, visit is not None)
        )
        if statistics is not None:
            statistics.update(replaced)
        for name, (center, radius) in boxes.items():
            assert visit is not None
            visit(graph[name], Box(center, radius))  # a merged node appears as the batch norm whose name it bears
        return found

    return loss


def _as_it_is(found: T) -> T:
    return found


def _copies(found: T) -> T:
    """The same with copies of all tensors; gradients flow through them."""
    copied: T = torch.utils._pytree.tree_map_only(Tensor, torch.clone, found)
    return copied
