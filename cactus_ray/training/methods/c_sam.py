"""C-SAM: a pruning mask that is flat in the space of masks (arXiv 2601.20301), with a certified loss inside.

Three stages: pretrain; search the mask, the whole network frozen, under uniform noise on soft masks; binarise, finetune
what is left. No code was published; where the paper leaves a choice, it is said here.

The paper's losses hold predictions still under mask noise and under generated changes of meaning, and leave the rest to
the frozen network. Ours ask for certified robustness, so that our verifier can judge it: standard and certified loss of
the noisy network are added, and the changed input is a point of the linf ball (the attack's, where the certified loss
attacks, else a random one). Probabilities under random changes of meaning are measured elsewhere (threat ``semantic``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.config import RunConfig
from cactus_ray.training.losses import Region
from cactus_ray.training.stages import Stage
from cactus_ray.training.step import Step, full_loss

MASK = ".mask"
DENSE = ".dense"
STABILITY, RATIO, CONSISTENCY, LENGTH = 5.0, 1.0, 1.0, 1.0
"""Weights of the losses; the last, of the mean of the soft masks, is not in the paper."""
SMALLEST_GAP = 0.05  # of probabilities: below it the ratio's gradient would drown all others
_BY_MAGNITUDE = 1e-6  # share of |w| / max|w| in a rank: it orders what the clipping of the masks made equal


def c_sam(step: Step) -> Iterator[Tensor]:
    """Standard and certified loss of the stage's network; in the search of its noisy copies, with the masks' losses."""
    kind = step.config.certified_loss
    assert kind is not None
    if step.stage != "mask":
        loss, _ = full_loss(step, kind)
        yield loss
        return
    dense, soft = _dense(step), _soft(step.graph, step.auxiliary)
    first, second = (apply_masks(dense, _noisy(step, soft)) for _ in range(2))
    certified, region = full_loss(replace(step, params=first, statistics={}, adversarial_statistics={}), kind)
    yield certified + mask_loss(step, dense, soft, (first, second), _changed(step, region))


def mask_loss(step: Step, dense: Params, soft: Params, noisy: tuple[Params, Params], changed: Tensor) -> Tensor:
    """The losses in the space of masks: 5 stability + ratio + consistency + mean of the masks.

    Predictions are probabilities p of clean images x and of ``changed`` ones. Stability: variance of p over two draws
    of the noise. Ratio: softplus(r - 1), where r compares how far p moves between x and its change, and between the
    two draws, with half the gap of the two largest probabilities. Consistency: KL divergence of the binarised network's
    p from that of the soft masks. The running statistics follow the binarised network, which is scored.
    """
    graph, images = step.graph, step.images
    p, of_second, of_changed = (
        forward(graph, params, inputs, collect={}).softmax(1)
        for params, inputs in ((noisy[0], images), (noisy[1], images), (noisy[1], changed))
    )
    stability = 0.25 * (p - of_second).square().sum(1).mean()  # two draws lie half their distance from their mean
    largest = p.topk(2, 1).values
    gap = (0.5 * (largest[:, 0] - largest[:, 1])).clamp(min=SMALLEST_GAP)
    ratio = F.softplus((p - of_changed).abs().amax(1) / gap - 1.0).mean()
    of_soft = forward(graph, apply_masks(dense, soft), images, collect={}).log_softmax(1)
    binary: Statistics = {}
    of_binary = forward(graph, step.params, images, collect=binary).log_softmax(1)
    step.statistics.update(binary)
    consistency = F.kl_div(of_binary, of_soft, reduction="batchmean", log_target=True)
    length = torch.cat([mask.flatten() for mask in soft.values()]).mean()
    return STABILITY * stability + RATIO * ratio + CONSISTENCY * consistency + LENGTH * length


def first_mask(weight: Tensor, saturated: float) -> Tensor:
    """Soft mask in [0, 1] of a weight: |w| in units of the magnitude that the share ``saturated`` reaches, clipped.

    So that share starts at 1. Our reading of Eq. 5 with its tau = 30; in units of max|w| most masks start near 0, and
    the paper's accuracy collapses.
    """
    magnitude = weight.abs().flatten()
    rank = max(1, round((1.0 - saturated) * magnitude.numel()))
    unit = magnitude.kthvalue(rank).values.clamp(min=1e-12)
    return (weight.abs() / unit).clamp(max=1.0)


def _begin_search(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    assert config.mask_saturated is not None
    for node in graph.weighted():
        weight = params[f"{node.name}.weight"]
        auxiliary[f"{node.name}{MASK}"] = first_mask(weight, config.mask_saturated)
        auxiliary[f"{node.name}{DENSE}"] = weight.clone()


def _searched(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    """Every weight times its binarised mask; the gradient goes straight to the soft one."""
    soft = _soft(graph, auxiliary)
    binary = binarised(config, graph, params, soft)
    return apply_masks(params, {name: mask - mask.detach() + binary[name] for name, mask in soft.items()})


def binarised(config: RunConfig, graph: Graph, params: Params, soft: Params) -> Params:
    """0/1 masks: over the whole network, exactly the share ``target_sparsity`` with the smallest soft masks is 0.

    Equal ones by magnitude, in units of the tensor's largest.
    """
    assert config.target_sparsity is not None
    ranks = {}
    for name, mask in soft.items():
        magnitude = params[name].detach().double().abs()
        ranks[name] = mask.detach().double() + _BY_MAGNITUDE * magnitude / magnitude.max().clamp(min=1e-12)
    found = masks(graph, ranks, "gu-l1", config.target_sparsity)
    return {name: mask.to(params[name].dtype) for name, mask in found.items()}


def _begin_finetuning(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
    found = binarised(config, graph, params, _soft(graph, auxiliary))
    auxiliary.clear()
    for name, mask in found.items():
        auxiliary[name.removesuffix(".weight") + MASK] = mask
        params[name] = params[name] * mask


def _finetuned(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    return apply_masks(params, _soft(graph, auxiliary))


def _soft(graph: Graph, auxiliary: Params) -> Params:
    """The masks by the name of their weight."""
    return {f"{n.name}.weight": auxiliary[f"{n.name}{MASK}"] for n in graph.weighted()}


def _dense(step: Step) -> Params:
    """The frozen network without any mask."""
    return step.params | {f"{n.name}.weight": step.auxiliary[f"{n.name}{DENSE}"] for n in step.graph.weighted()}


def _noisy(step: Step, soft: Params) -> Params:
    """clip(C + xi, 0, 1) with xi uniform in [-mask_noise, mask_noise], the same on all workers."""
    noise = step.config.mask_noise
    assert noise is not None
    seed = int(torch.randint(2**63 - 1, (), generator=step.generator))
    generator = torch.Generator(step.images.device).manual_seed(seed)
    found = {}
    for name, mask in soft.items():
        draws = torch.rand(mask.shape, generator=generator, dtype=mask.dtype, device=mask.device)
        found[name] = (mask + noise * (2.0 * draws - 1.0)).clamp(0.0, 1.0)
    return found


def _changed(step: Step, region: Region) -> Tensor:
    """A point of the ball around each image: the attack's, else a random one."""
    if region.point is not None:
        return region.point
    draws = torch.rand(step.images.shape, generator=step.latent_generator, dtype=step.images.dtype,
                       device=step.images.device)  # fmt: skip
    return region.ball.center + (2.0 * draws - 1.0) * region.ball.radius


def _clip(step: Step) -> None:
    for mask in _soft(step.graph, step.auxiliary).values():
        mask.clamp_(0.0, 1.0)


STAGES = (
    Stage("pretrain"),
    Stage("mask", trains=lambda _, name: name.endswith(MASK), begin=_begin_search, network=_searched, after=_clip),
    Stage("finetune", begin=_begin_finetuning, network=_finetuned),
)
