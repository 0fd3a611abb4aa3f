"""What one training step is made of: its inputs, and the losses of the full network and of a member on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, trainable
from cactus_ray.bounds.interval import ball
from cactus_ray.config import RunConfig
from cactus_ray.training.attacks import pgd
from cactus_ray.training.losses import ATTACKED, CERTIFIED_LOSSES, RampRegularizer, Region, standard
from cactus_ray.training.precision import of_attack
from cactus_ray.training.workers import Alone, Workers

_EPSILON_OF_REGULARIZER = 1e-6  # stands for 0, where every ratio of widths would be 0/0 (Shi et al. 2021)


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that the loss of one step depends on.

    ``params`` holds leaves that require gradients, and buffers. ``noise`` [N, C, H, W] in [0, 1) starts the attack.
    ``epsilon`` and ``standard_weight`` are the scheduled values, ``progress`` in [0, 1) the share of all steps that is
    done, ``index`` the step within the epoch. ``generator`` (CPU) gives the same numbers to every worker, ``memory``
    lives for one epoch. A method leaves the batch-norm
    statistics of the full network in ``statistics``.
    """

    config: RunConfig
    graph: Graph
    params: Params
    images: Tensor
    labels: Tensor
    noise: Tensor
    epsilon: float
    standard_weight: float
    progress: float
    index: int
    generator: torch.Generator
    memory: dict[str, Any] = field(default_factory=dict)
    workers: Workers = field(default_factory=Alone)
    statistics: Statistics = field(default_factory=dict)

    @property
    def certifies(self) -> bool:
        """Whether the certified loss has a weight yet."""
        return self.standard_weight < 1.0

    def gradients(self) -> Params:
        """What has been accumulated so far in the leaves."""
        return {k: v.grad for k, v in trainable(self.params).items() if v.grad is not None}


def full_loss(step: Step, kind: str) -> tuple[Tensor, Region]:
    """Loss of the full network, and the region that the members share.

    ``standard_weight * CE + (1 - standard_weight) * certified`` (CACTUS, Eq. 7) with the certified loss ``kind``, plus
    the ramp regularisers. Clean pass, attack and box all use the clean batch's batch-norm statistics; gradients flow
    into them from the box (Shi et al. 2021). A pass whose loss has no weight is not made.
    """
    clean = _clean(step, step.params, step.images, step.labels, step.statistics)
    region = Region(step.labels, ball(step.images, step.epsilon, step.config.threat.domain))
    if step.certifies:
        region = _attacked(step, region) if kind in ATTACKED else region
    strength = _regularizer_strength(step)
    if strength == 0.0:
        return _weighted(step, step.params, clean, region, kind, step.statistics), region
    visitor = RampRegularizer()
    loss = _regularized(step, clean, region, kind, visitor)
    return loss + strength * visitor.value(), region


def member_loss(step: Step, params: Params, region: Region, kind: str) -> Tensor:
    """Loss of one member (the tensors ``params``) on the first images of the batch, as many as the region has.

    The member normalises with its own clean-batch statistics, and shares the region of the full network.
    """
    statistics: Statistics = {}
    count = len(region.labels)
    clean = _clean(step, params, step.images[:count], region.labels, statistics)
    return _weighted(step, params, clean, region, kind, statistics)


def ascent_loss(step: Step, params: Params, region: Region, kind: str) -> Tensor:
    """What the weight perturbation raises: standard plus certified loss, unweighted (CACTUS, Eq. 9)."""
    statistics: Statistics = {}
    clean = standard(step.graph, params, step.images[: len(region.labels)], region.labels, statistics)
    return clean + CERTIFIED_LOSSES[kind](step.graph, params, region, statistics=statistics)


def _clean(step: Step, params: Params, images: Tensor, labels: Tensor, statistics: Statistics) -> Tensor | None:
    """The standard loss, or None where neither it nor its batch-norm statistics are used."""
    if step.standard_weight == 0.0 and all(n.op != "batch_norm" for n in step.graph.nodes):
        return None
    return standard(step.graph, params, images, labels, statistics)


def _weighted(
    step: Step, params: Params, clean: Tensor | None, region: Region, kind: str, statistics: Statistics
) -> Tensor:
    if not step.certifies:
        assert clean is not None
        return clean
    certified = CERTIFIED_LOSSES[kind](step.graph, params, region, statistics=statistics)
    return _mixed(step, clean, certified)


def _mixed(step: Step, clean: Tensor | None, certified: Tensor) -> Tensor:
    weighted = (1.0 - step.standard_weight) * certified
    return weighted if clean is None or step.standard_weight == 0.0 else weighted + step.standard_weight * clean


def _regularized(step: Step, clean: Tensor | None, region: Region, kind: str, visitor: RampRegularizer) -> Tensor:
    """The weighted loss whose bound pass ``visitor`` sees; without a certified loss a pass over tiny balls."""
    if step.certifies and step.epsilon > _EPSILON_OF_REGULARIZER:
        loss = CERTIFIED_LOSSES[kind]
        return _mixed(
            step, clean, loss(step.graph, step.params, region, statistics=step.statistics, visit=visitor)
        )  # fmt: skip
    tiny = Region(step.labels, ball(step.images, _EPSILON_OF_REGULARIZER, step.config.threat.domain))
    CERTIFIED_LOSSES["ibp"](step.graph, step.params, tiny, statistics=step.statistics, visit=visitor)
    return _weighted(step, step.params, clean, region, kind, step.statistics)


def _regularizer_strength(step: Step) -> float:
    """Falls from ``train.regularizer`` to 0 as epsilon rises (Shi et al. 2021, Sec. 4.3)."""
    final = step.config.threat.epsilon
    return step.config.train.regularizer * (1.0 - step.epsilon / final) if final > 0 else 0.0


def _attacked(step: Step, region: Region) -> Region:
    config = step.config
    assert config.attack_steps is not None
    assert config.attack_step_size is not None
    assert config.box_ratio is not None
    with of_attack(config.train, step.images.device):
        point = pgd(
            step.graph, step.params, step.labels, region.ball,
            steps=config.attack_steps, step_size=config.attack_step_size * step.epsilon,
            start=step.noise, statistics=step.statistics,
        )  # fmt: skip
    return Region(region.labels, region.ball, point, config.box_ratio)
