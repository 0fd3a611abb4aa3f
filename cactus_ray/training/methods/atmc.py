"""ATMC: adversarially trained model compression (Gui et al. 2019), with the certified loss in place of theirs.

Four stages: the dense network; its largest weights (projection after every step); weights ``W = U V + C`` with the
largest entries of all U, V and C; and the same drawn to few values per tensor, by ADMM. The weight is one matrix to
losses, attacks and bounds: these are of ``|U V + C|``, which is at most ``|U| |V| + |C|``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.codebook import cluster
from cactus_ray.compression.factorize import PARTS, entries
from cactus_ray.compression.prune import keep_largest
from cactus_ray.config import RunConfig
from cactus_ray.training.stages import Stage
from cactus_ray.training.step import Step, full_loss

GOAL, DUAL = "_goal", "_dual"
"""What an entry of U, V or C is drawn to (theta'), and the scaled dual variable (u)."""
MOVES = "moves"
"""Steps of the last stage so far; on the host."""


def atmc(step: Step) -> Iterator[Tensor]:
    """Standard and certified loss, and in the last stage ``weight / 2 * |theta + u - theta'|^2``."""
    assert step.config.certified_loss is not None
    loss, _ = full_loss(step, step.config.certified_loss)
    names = [name.removesuffix(GOAL) for name in step.auxiliary if name.endswith(GOAL)]
    if names:
        own = step.auxiliary
        gaps = [(own[k] + own[f"{k}{DUAL}"] - own[f"{k}{GOAL}"]).square().sum() for k in names]
        assert step.config.admm_weight is not None
        loss = loss + 0.5 * step.config.admm_weight * torch.stack(gaps).sum()
    yield loss


def zero_kmeans(values: Tensor, support: Tensor, bits: int) -> Tensor:
    """The nearest tensor of at most ``2^bits`` values, 0 among them, that is 0 outside of ``support``.

    Found on the host, which waits for the device once in ``admm_every`` steps: the rounds end when nothing moves any
    more, and all is float64, as in the codebooks of levels.
    """
    places, table = cluster((values * support).cpu(), bits)
    return table[places.int()].to(values)


def _names(graph: Graph) -> list[str]:
    return [f"{node.name}.{part}" for node in graph.weighted() for part in PARTS]


def _entries(config: RunConfig, graph: Graph, params: Params) -> int:
    """How many nonzeros may stay, of as many as all weights have."""
    assert config.target_sparsity is not None
    total = sum(params[f"{node.name}.weight"].numel() for node in graph.weighted())
    return entries(1.0 - config.target_sparsity, total)


def _project(tensors: list[Tensor], kept: int) -> None:
    """Sets all but the ``kept`` largest absolute values of all tensors to 0, in place."""
    sizes = [t.numel() for t in tensors]
    mask = keep_largest(torch.cat([t.abs().flatten() for t in tensors]), max(sum(sizes) - kept, 0))
    for tensor, part in zip(tensors, mask.split_with_sizes(sizes), strict=True):
        tensor.mul_(part.view_as(tensor))


def _project_weights(config: RunConfig, graph: Graph, params: Params) -> None:
    _project([params[f"{node.name}.weight"] for node in graph.weighted()], _entries(config, graph, params))


def _begin_sparse(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    _project_weights(config, graph, params)


def _begin_factorised(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    """U V is the weight itself at full rank, the shorter side's factor being the identity; C is 0."""
    for node in graph.weighted():
        weight = params[f"{node.name}.weight"].flatten(1)
        short = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
        left, right = (short, weight) if weight.shape[0] <= weight.shape[1] else (weight, short)
        parts = left, right, torch.zeros_like(weight)
        auxiliary |= {f"{node.name}.{part}": tensor.clone() for part, tensor in zip(PARTS, parts, strict=True)}
    _project([auxiliary[name] for name in _names(graph)], _entries(config, graph, params))


def _begin_quantised(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    assert config.codebook_bits is not None
    auxiliary[MOVES] = torch.zeros((), dtype=torch.int64)
    for name in _names(graph):
        theta = auxiliary[name]
        auxiliary[f"{name}{GOAL}"] = zero_kmeans(theta, theta != 0, config.codebook_bits)
        auxiliary[f"{name}{DUAL}"] = torch.zeros_like(theta)


def _formed(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    """The network of weights U V + C; the factors stand beside them, for the level ``lr+sparse``.

    What is kept may be an average over several supports, and is projected; what is trained always is already.
    """
    if not torch.is_grad_enabled():
        auxiliary = auxiliary | {name: auxiliary[name].clone() for name in _names(graph)}
        _project([auxiliary[name] for name in _names(graph)], _entries(config, graph, params))
    found = params | {name: auxiliary[name] for name in _names(graph)}
    for node in graph.weighted():
        left, right, sparse = (auxiliary[f"{node.name}.{part}"] for part in PARTS)
        name = f"{node.name}.weight"
        found[name] = (left @ right + sparse).view_as(params[name])
    return found


def _after_sparse(step: Step) -> None:
    _project_weights(step.config, step.graph, step.params)


def _after_factorised(step: Step) -> None:
    _project([step.auxiliary[name] for name in _names(step.graph)], _entries(step.config, step.graph, step.params))


def _after_quantised(step: Step) -> None:
    """Projection, and every ``admm_every`` steps theta' and u."""
    _after_factorised(step)
    config, own = step.config, step.auxiliary
    assert config.codebook_bits is not None
    assert config.admm_every is not None
    own[MOVES] += 1
    if int(own[MOVES]) % config.admm_every:
        return
    for name in _names(step.graph):
        theta, goal, dual = own[name], own[f"{name}{GOAL}"], own[f"{name}{DUAL}"]
        goal.copy_(zero_kmeans(theta + dual, theta != 0, config.codebook_bits))
        dual.add_(theta - goal)


def _is_factored(graph: Graph, name: str) -> bool:
    """U, V and C, biases and batch norm; weights are made of these."""
    node, _, kind = name.rpartition(".")
    return kind in (*PARTS, "bias") or (kind == "weight" and graph[node].op == "batch_norm")


STAGES = (
    Stage("dense"),
    Stage("sparse", begin=_begin_sparse, after=_after_sparse),
    Stage("factorised", trains=_is_factored, begin=_begin_factorised, network=_formed, after=_after_factorised),
    Stage("quantised", trains=_is_factored, begin=_begin_quantised, network=_formed, after=_after_quantised),
)
