"""What one training step is made of: its inputs, and the losses of the full network and of a member on them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, trainable
from cactus_ray.bounds.interval import Box, ball
from cactus_ray.config import RunConfig
from cactus_ray.training.compiled import AS_WRITTEN, Passes
from cactus_ray.training.layout import channels_last
from cactus_ray.training.losses import (
    ATTACKED,
    DURING_RAMP,
    EXPRESSIVE,
    UNBOUNDED,
    LossOptions,
    RampRegularizer,
    Region,
    Visitor,
)
from cactus_ray.training.precision import of_attack
from cactus_ray.training.schedule import crown_weight_at
from cactus_ray.training.workers import Alone, Workers

_EPSILON_OF_REGULARIZER = 1e-6  # stands for 0, where every ratio of widths would be 0/0 (Shi et al. 2021)


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that the loss of one step depends on.

    ``params`` holds the network's tensors, differentiable in the leaves of the ``stage``, and buffers; ``auxiliary``
    the method's own tensors, which persist (``stages.Stage``). ``noise`` [N, C, H, W] in [0, 1) starts the attack.
    ``epsilon`` and ``standard_weight`` are the scheduled values, ``progress`` in [0, 1) the share of the stage's steps
    that is done, ``index`` the step within the epoch. ``generator`` (CPU) gives the same numbers to every worker,
    ``latent_generator`` (on the images' device) is each worker's own, ``memory`` lives for one epoch. A method leaves
    the batch-norm statistics of the full network in ``statistics`` and, where its loss normalises with the adversarial
    batch, that batch's in ``adversarial_statistics``: the running ones follow both. ``passes``: how attack, clean pass
    and certified loss are run.
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
    adversarial_statistics: Statistics = field(default_factory=dict)
    latent_generator: torch.Generator | None = None
    stage: str = ""
    auxiliary: Params = field(default_factory=dict)
    passes: Passes = AS_WRITTEN

    @property
    def certifies(self) -> bool:
        """Whether the certified loss has a weight yet."""
        return self.standard_weight < 1.0

    @property
    def options(self) -> LossOptions:
        """The options of the certified loss at this step."""
        config = self.config
        given = {f.name: getattr(config, f.name) for f in fields(LossOptions)}
        if config.crown_weight is not None:
            given["crown_weight"] = crown_weight_at(self.epsilon, config.training_epsilon, config.crown_weight)
        return LossOptions(**{name: value for name, value in given.items() if value is not None})

    def gradients(self) -> Params:
        """What has been accumulated so far in the leaves among the network's tensors."""
        leaves = {k: v for k, v in trainable(self.params).items() if v.is_leaf}
        return {k: v.grad for k, v in leaves.items() if v.grad is not None}


def full_loss(
    step: Step, kind: str, *, region: Region | None = None, visit: Visitor | None = None
) -> tuple[Tensor, Region]:
    """Loss of the full network, and the region that the members share.

    ``standard_weight * CE + (1 - standard_weight) * certified`` (CACTUS, Eq. 7) with the certified loss ``kind``, plus
    the ramp regularisers. Clean pass and box use the clean batch's batch-norm statistics, and so does the attack;
    gradients flow into them from the box (Shi et al. 2021). The expressive losses attack with the running statistics
    and take those of the adversarial batch for the box, as their authors do. A pass whose loss has no weight is not
    made. With ``region`` its points are taken and nothing is attacked. ``visit`` sees the certified loss's bound pass.
    """
    params = channels_last(step.params)
    clean = _clean(step, kind, params, step.images, step.labels, step.statistics)
    if region is None:
        images = ball(step.images, step.epsilon, step.config.threat.domain)
        region = Region(step.labels, images, generator=step.latent_generator)
        if step.certifies and kind in ATTACKED:
            region = _attacked(step, params, region, kind)
    strength = 0.0 if kind in UNBOUNDED else _regularizer_strength(step)
    if strength == 0.0:
        return _weighted(step, params, clean, region, kind, step.statistics, visit), region
    visitor = RampRegularizer()
    loss = _regularized(step, params, clean, region, kind, visitor, visit)
    return loss + strength * visitor.value(), region


def member_loss(step: Step, params: Params, region: Region, kind: str) -> Tensor:
    """Loss of one member (the tensors ``params``) on the first images of the batch, as many as the region has.

    The member normalises with its own batch's statistics, and shares the region of the full network.
    """
    statistics: Statistics = {}
    params, count = channels_last(params), len(region.labels)
    clean = _clean(step, kind, params, step.images[:count], region.labels, statistics)
    return _weighted(step, params, clean, region, kind, statistics)


def ascent_loss(step: Step, params: Params, region: Region, kind: str) -> Tensor:
    """What the weight perturbation raises: standard plus certified loss, unweighted (CACTUS, Eq. 9)."""
    statistics: Statistics = {}
    params = channels_last(params)
    images = step.images[: len(region.labels)]
    clean = step.passes.standard(step.graph, params, images, region.labels, statistics)
    return clean + _certified(step, params, region, kind, statistics)


def _clean(
    step: Step, kind: str, params: Params, images: Tensor, labels: Tensor, statistics: Statistics
) -> Tensor | None:
    """The standard loss, or None where neither it nor its batch-norm statistics are used."""
    if step.standard_weight == 0.0:
        if all(node.op != "batch_norm" for node in step.graph.nodes):
            return None
        if kind in EXPRESSIVE:  # the box does without; only the running statistics of the full network follow
            if statistics is step.statistics:
                with torch.no_grad():
                    step.passes.standard(step.graph, params, images, labels, statistics)
            return None
    return step.passes.standard(step.graph, params, images, labels, statistics)


def _certified(
    step: Step, params: Params, region: Region, kind: str, statistics: Statistics, visit: Visitor | None = None
) -> Tensor:
    """The certified loss in use at this step, with the clean batch's ``statistics``, which stay as they are."""
    if step.epsilon < step.config.training_epsilon:
        kind = DURING_RAMP.get(kind, kind)
    used = dict(statistics)
    loss = step.passes.certified[kind](step.graph, params, region, step.options, statistics=used, visit=visit)
    if kind in EXPRESSIVE and statistics is step.statistics:
        step.adversarial_statistics.update(used)
    return loss


def _weighted(
    step: Step, params: Params, clean: Tensor | None, region: Region, kind: str, statistics: Statistics,
    visit: Visitor | None = None,
) -> Tensor:  # fmt: skip
    if not step.certifies:
        assert clean is not None
        return clean
    return _mixed(step, clean, _certified(step, params, region, kind, statistics, visit))


def _mixed(step: Step, clean: Tensor | None, certified: Tensor) -> Tensor:
    weighted = (1.0 - step.standard_weight) * certified
    return weighted if clean is None or step.standard_weight == 0.0 else weighted + step.standard_weight * clean


def _regularized(
    step: Step, params: Params, clean: Tensor | None, region: Region, kind: str, visitor: RampRegularizer,
    visit: Visitor | None,
) -> Tensor:  # fmt: skip
    """The weighted loss whose bound pass both visitors see; without a certified loss one over tiny balls the first."""

    def both(node: Node, box: Box) -> None:
        visitor(node, box)
        if visit is not None:
            visit(node, box)

    if step.certifies and step.epsilon > _EPSILON_OF_REGULARIZER:
        return _mixed(step, clean, _certified(step, params, region, kind, step.statistics, both))
    tiny = Region(step.labels, ball(step.images, _EPSILON_OF_REGULARIZER, step.config.threat.domain))
    step.passes.certified["ibp"](step.graph, params, tiny, step.options, statistics=step.statistics, visit=visitor)
    return _weighted(step, params, clean, region, kind, step.statistics, visit)


def _regularizer_strength(step: Step) -> float:
    """Falls from ``train.regularizer`` to 0 as epsilon rises (Shi et al. 2021, Sec. 4.3)."""
    final = step.config.training_epsilon
    return step.config.train.regularizer * (1.0 - step.epsilon / final) if final > 0 else 0.0


def _attacked(step: Step, params: Params, region: Region, kind: str) -> Region:
    """The region with the points that the attack found."""
    config = step.config
    assert config.attack_steps is not None
    assert config.attack_step_size is not None
    radius, searched, statistics = step.epsilon, region.ball, step.statistics
    if kind in EXPRESSIVE:
        assert config.attack_radius_factor is not None
        radius, statistics = config.attack_radius_factor * step.epsilon, {}
        if config.attack_radius_factor != 1.0:
            searched = ball(step.images, radius, config.threat.domain)
    with of_attack(config.train, step.images.device):
        point = step.passes.attack(
            step.graph, params, step.labels, searched, steps=config.attack_steps,
            step_size=config.attack_step_size * radius, start=step.noise, statistics=statistics,
        )  # fmt: skip
    return Region(region.labels, region.ball, point, region.generator)
