"""CACTUS: compression-aware certified training (arXiv 2506.11992).

The loss is the mean over the compression set (Eq. 8) of ``standard_weight * CE + (1 - standard_weight) * certified``
(Eq. 7). The full network is always a member and attacked once; pruned and perturbed members share its adversarial
points, which are valid places for their boxes too, and so save an attack per member.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params
from cactus_ray.compression.prune import apply_masks, masks, without_removed_inputs
from cactus_ray.compression.sets import draw, prunings
from cactus_ray.config import CompressionSetConfig
from cactus_ray.training import perturb
from cactus_ray.training.losses import Region
from cactus_ray.training.step import Step, ascent_loss, full_loss, member_loss


def cactus(step: Step) -> Iterator[Tensor]:
    """The members' losses, each divided by their number; the full network first.

    Members beside it: a copy per drawn sparsity, pruned by the current weights; with ``awp_radius`` > 0 also the full
    network with perturbed weights ("separate"), or each pruned copy is perturbed ("pruned"; the full network where no
    copy is pruned), as soon as the certified loss has a weight. Members see the first ``member_fraction`` of the
    (shuffled) batch: the mean over it estimates the same loss without bias, so the weights stay.
    """
    config = step.config
    kind, chosen, eta = config.certified_loss, config.compression_set, config.awp_radius
    assert kind is not None
    assert chosen is not None
    assert eta is not None
    sparsities = _sparsities(step, chosen)
    perturbed = eta > 0.0 and step.certifies
    separate = perturbed and (config.awp_member == "separate" or not sparsities)
    share = 1.0 / (1 + len(sparsities) + separate)

    loss, region = full_loss(step, kind)
    yield share * loss
    region = region.first(math.ceil(chosen.member_fraction * len(region.labels)))
    # Before another member adds to the gradients, which then are those of the full network alone.
    deltas = _deltas(step, step.params, region) if separate else None
    kept = _masks(step, chosen, sparsities)

    if deltas is not None:
        yield share * member_loss(step, perturb.apply(step.params, deltas), region, kind)
    for family, mask in kept:
        member = apply_masks(step.params, mask)
        if perturbed and not separate:
            if family[1] == "s":  # steps and grids are those of the smaller network that is deployed
                member = without_removed_inputs(step.graph, member, mask)
            member = perturb.apply(member, _deltas(step, member, region, mask))
        yield share * member_loss(step, member, region, kind)


def _sparsities(step: Step, chosen: CompressionSetConfig) -> tuple[float, ...]:
    """Drawn anew every ``refresh_every`` steps, counted from the start of the epoch."""
    if step.index % chosen.refresh_every == 0 or "sparsities" not in step.memory:
        step.memory["sparsities"] = draw(chosen, step.progress, step.generator, step.graph, step.params)
        step.memory.pop("masks", None)
    sparsities: tuple[float, ...] = step.memory["sparsities"]
    return sparsities


def _masks(step: Step, chosen: CompressionSetConfig, sparsities: tuple[float, ...]) -> list[tuple[str, Params]]:
    """Families, and masks from the current weights, kept as long as the sparsities are.

    Families scored by gradients take the one of the full network's loss on this batch, the mean over all workers.
    """
    if "masks" not in step.memory:
        gradients = None
        if sparsities and chosen.family.endswith("-grad"):
            gradients = _shared_gradients(step)
        made = prunings(chosen, sparsities, step.generator)
        step.memory["families"] = [family for family, _ in made]
        step.memory["masks"] = [masks(step.graph, step.params, family, s, gradients) for family, s in made]
    return list(zip(step.memory["families"], step.memory["masks"], strict=True))


def _shared_gradients(step: Step) -> Params:
    """The full network's so far, the mean over all workers; those that are still summed stay as they are."""
    if step.workers.size == 1:
        return step.gradients()
    gradients = {name: gradient.clone() for name, gradient in step.gradients().items()}
    step.workers.mean_(list(gradients.values()))
    return gradients


def _deltas(step: Step, params: Params, region: Region, mask: Params | None = None) -> Params:
    """Perturbations of the weights within ``awp_radius``; under a ``mask`` what is pruned stays exactly zero.

    noise: uniform, the same on all workers; rounding: to the grid of twice the radius. Neither costs a pass.

    ascent: those that raise standard plus certified loss on the region (Eq. 9). For the full network and one step, the
    sign of its own gradient (of the weighted loss, on the whole batch) stands for theirs: it is there already, as in
    SAM, and saves the inner passes; else every step costs a forward and a backward pass of both losses. Workers
    ascend together, on the mean of their gradients.
    """
    config = step.config
    kind, steps = config.certified_loss, config.awp_steps
    assert kind is not None
    assert steps is not None
    assert config.awp_radius is not None
    assert config.awp_unit is not None
    limits = perturb.radii(step.graph, params, config.awp_radius, config.awp_unit)
    if mask is not None:
        limits = apply_masks(limits, mask)
    if config.awp_kind == "noise":
        seed = int(torch.randint(2**63 - 1, (), generator=step.generator))
        return perturb.noise(params, limits, torch.Generator(step.images.device).manual_seed(seed))
    if config.awp_kind == "rounding":
        return perturb.rounding(params, limits)
    if mask is None and steps == 1:
        return perturb.jump(_shared_gradients(step), limits)
    return perturb.ascend(
        lambda member: ascent_loss(step, member, region, kind), params, limits, steps, step.workers
    )  # fmt: skip
