"""Pruning masks: which weights, or which channels, a level sets to zero.

Families are written ``{g|l}{u|s}-{l1|l2|grad}``: global or local (one threshold for the network, or one per layer),
unstructured or structured (single weights, or output channels), and the score. Biases are never scored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.channels import ChannelGroup, channel_groups


@torch.no_grad()
def masks(graph: Graph, params: Params, family: str, sparsity: float, gradients: Params | None = None) -> Params:
    """0/1 tensors by parameter name, in the parameters' dtype and on their device; what has none is kept whole.

    Unstructured: exactly ``round(sparsity * n)`` of the n conv and linear weights (``l``: of every tensor, the
    classifier included) with the smallest ``|w|`` (l1, l2) or ``|w * gradient|`` (grad) are 0.

    Structured: exactly ``round(sparsity * n)`` of the n removable channels (``channel_groups``) with the smallest score
    are 0, but one channel per group always stays. A channel's score is the plain l1 or l2 norm of its filter (grad: the
    l2 norm of ``w * gradient``), not divided by the fan-in, summed over the producers that share it. Filter, bias and
    batch norm (weight and bias; the running mean where it has neither) are masked, so the channel is 0 after ReLU.

    Ties fall by index, the first of equal scores first. Deterministic; no gradient flows. No host synchronisation on a
    GPU. ``grad`` needs ``gradients`` (``calibration.gradients``), else ValueError.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity = {sparsity}; expected 0 <= sparsity < 1")
    scope, shape, score = family[0], family[1], family[3:]
    if score == "grad" and gradients is None:
        raise ValueError(f"family {family!r} needs gradients")
    if shape == "s":
        return _structured(graph, params, scope, sparsity, _channel_score(params, score, gradients))
    names = [f"{n.name}.weight" for n in graph.weighted()]
    scores = [params[k].abs() if score != "grad" else (params[k] * (gradients or {})[k]).abs() for k in names]
    flat = [s.flatten() for s in scores]
    if scope == "g":
        kept = keep_largest(torch.cat(flat), round(sparsity * sum(s.numel() for s in flat)))
        kept_by_tensor = list(torch.split_with_sizes(kept, [s.numel() for s in flat]))
    else:
        kept_by_tensor = [keep_largest(s, round(sparsity * s.numel())) for s in flat]
    return {k: m.view_as(params[k]).to(params[k].dtype) for k, m in zip(names, kept_by_tensor, strict=True)}


def apply_masks(params: Params, masks: Params) -> Params:
    """``tensor * mask`` for every tensor with a mask, the others as they are. Differentiable in ``params``."""
    return {k: v * masks[k] if k in masks else v for k, v in params.items()}


def without_removed_inputs(graph: Graph, params: Params, masks: Params) -> Params:
    """``params`` with the weights that read channels which structured ``masks`` remove set to 0, as if cut out.

    The masked network computes the same with and without: those channels are 0. Differentiable in ``params``.
    """
    found = dict(params)
    for group in channel_groups(graph, params):
        keep = kept_channels(masks, group)
        for name in (f"{consumer}.weight" for consumer in group.consumers):
            weight = found[name]
            columns = keep.repeat_interleave(weight.shape[1] // keep.numel(), output_size=weight.shape[1])
            found[name] = weight * columns.view(1, -1, *([1] * (weight.dim() - 2)))
    return found


def kept_channels(masks: Params, group: ChannelGroup) -> Tensor:
    """Bool [size]: the channels of a group that structured ``masks`` keep."""
    return masks[f"{group.producers[0]}.weight"].flatten(1)[:, 0] != 0


def keep_largest(scores: Tensor, removed: int) -> Tensor:
    """Bool like ``scores`` [n]: False for exactly the ``removed`` smallest, equal ones by index."""
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, removed)
    above = scores > threshold
    ties = scores == threshold
    if scores.device.type == "cpu" and int(above.sum()) == scores.numel() - removed:
        return above  # no tie across the threshold: skip the running count, which is slow on a CPU
    ties_removed = removed - (scores < threshold).sum()
    return above | (ties & (ties.cumsum(0) > ties_removed))


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type == "cpu":
        return scores.kthvalue(k).values
    # kthvalue runs in a single block of a GPU; topk takes the whole of it.
    n = scores.numel()
    if k <= n // 2:
        return scores.topk(k, largest=False, sorted=False).values.max()
    return scores.topk(n - k + 1, sorted=False).values.min()


def _structured(graph: Graph, params: Params, scope: str, sparsity: float, score: Callable[[str], Tensor]) -> Params:
    groups = channel_groups(graph, params)
    if not groups:
        return {}
    scores = []
    for group in groups:
        total = torch.stack([score(name) for name in group.producers]).sum(0)
        best = group.size - 1 - total.flip(0).argmax()  # of equal ones the last, because ties fall from the first on
        index = torch.arange(group.size, device=total.device)
        scores.append(torch.where(index == best, torch.inf, total))
    if scope == "g":
        n = sum(g.size for g in groups)
        kept = keep_largest(torch.cat(scores), min(round(sparsity * n), n - len(groups)))
        kept_by_group = list(torch.split_with_sizes(kept, [g.size for g in groups]))
    else:
        kept_by_group = [keep_largest(s, min(round(sparsity * s.numel()), s.numel() - 1)) for s in scores]
    found: Params = {}
    for group, keep in zip(groups, kept_by_group, strict=True):
        for name in group.producers:
            _mask_rows(found, params, f"{name}.weight", keep)
            _mask_rows(found, params, f"{name}.bias", keep)
        for name in group.affine:
            without_affine = f"{name}.weight" not in params
            for suffix in ("weight", "bias", "scale", "shift", *(["running_mean"] if without_affine else [])):
                _mask_rows(found, params, f"{name}.{suffix}", keep)
    return found


def _mask_rows(found: Params, params: Params, name: str, keep: Tensor) -> None:
    """Adds the mask of one tensor whose first dimension holds the channels (several entries each after flatten)."""
    tensor = params.get(name)
    if tensor is None:
        return
    rows = keep.repeat_interleave(tensor.shape[0] // keep.numel(), output_size=tensor.shape[0])
    found[name] = rows.view(-1, *([1] * (tensor.dim() - 1))).expand_as(tensor).to(tensor.dtype)


def _channel_score(params: Params, score: str, gradients: Params | None) -> Callable[[str], Tensor]:
    def of_layer(name: str) -> Tensor:
        key = f"{name}.weight"
        weight = params[key] if score != "grad" else params[key] * (gradients or {})[key]
        norm: Tensor = torch.linalg.vector_norm(weight.flatten(1), ord=1 if score == "l1" else 2, dim=1)
        return norm

    return of_layer
