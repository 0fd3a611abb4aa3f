"""HYDRA: a pruning mask learned with the certified loss (Sehwag et al. 2020).

Three stages, all with the certified loss: pretrain; search the mask, every weight frozen, by gradients to importance
scores; finetune what is left (Sec. 3.2, Eq. 4). Every convolution and linear layer loses the same share of its weights,
the classifier too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.config import RunConfig
from cactus_ray.training.stages import Stage
from cactus_ray.training.step import Step, full_loss

SCORES = ".scores"
MASK = ".mask"


def hydra(step: Step) -> Iterator[Tensor]:
    """Standard and certified loss of the stage's network."""
    assert step.config.certified_loss is not None
    loss, _ = full_loss(step, step.config.certified_loss)
    yield loss


def scores_of(weight: Tensor) -> Tensor:
    """First scores of a weight [out, ...]: ``sqrt(6 / fan_in) * w / max|w|`` (Sec. 3.3, scaled initialisation)."""
    fan_in = weight[0].numel()
    return math.sqrt(6.0 / fan_in) * weight / weight.abs().max().clamp(min=1e-12)


def _begin_search(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    for node in graph.weighted():
        auxiliary[f"{node.name}{SCORES}"] = scores_of(params[f"{node.name}.weight"])


def _searched(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    """Every weight times its mask; gradients reach the scores as if the mask were ``|score|``."""
    found = _masks(config, graph, auxiliary)
    through = {k: _Through.apply(auxiliary[_of(k, SCORES)].abs(), mask) for k, mask in found.items()}  # type: ignore[no-untyped-call]
    return apply_masks(params, through)


def _begin_finetuning(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    found = _masks(config, graph, auxiliary)
    auxiliary.clear()
    for name, mask in found.items():
        auxiliary[_of(name, MASK)] = mask
        params[name] = params[name] * mask


def _finetuned(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    return apply_masks(params, {f"{n.name}.weight": auxiliary[f"{n.name}{MASK}"] for n in graph.weighted()})


def _masks(config: RunConfig, graph: Graph, auxiliary: Params) -> Params:
    """Masks by the name of the weight: the same share of the smallest ``|score|`` of every layer is 0."""
    assert config.target_sparsity is not None
    scores = {f"{n.name}.weight": auxiliary[f"{n.name}{SCORES}"] for n in graph.weighted()}
    return masks(graph, scores, "lu-l1", config.target_sparsity)


def _of(weight: str, suffix: str) -> str:
    return weight.removesuffix(".weight") + suffix


def _is_searched(graph: Graph, name: str) -> bool:
    """Scores, and as in the authors' code batch norm; weights and other biases are frozen."""
    node, _, _ = name.rpartition(".")
    return name.endswith(SCORES) or graph[node].op == "batch_norm"


class _Through(torch.autograd.Function):
    """The mask; its gradient goes straight to what was ranked."""

    @staticmethod
    def forward(ctx: Any, ranked: Tensor, mask: Tensor) -> Tensor:
        return mask.view_as(mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


STAGES = (
    Stage("pretrain"),
    Stage("mask", trains=_is_searched, begin=_begin_search, network=_searched),
    Stage("finetune", begin=_begin_finetuning, network=_finetuned),
)
