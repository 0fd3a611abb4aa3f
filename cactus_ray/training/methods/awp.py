"""AWP: adversarial weight perturbation in l2 (Wu et al. 2020), around the certified loss.

CACTUS perturbs within linf balls of quantisation steps instead, and beside the full network (``methods/cactus.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params
from cactus_ray.training import perturb
from cactus_ray.training.step import Step, full_loss


def awp(step: Step) -> Iterator[Tensor]:
    """The loss at weights that raise it; its gradient moves the weights themselves (Wu et al. 2020, Eq. 9-11).

    One ascent step from the weights, as in the authors' code, as soon as the certified loss has a weight. The attack is
    shared by both passes. Each worker ascends on its own images. Running statistics follow the unperturbed network (in
    the authors' code the perturbed one), since that is what is deployed.
    """
    kind, gamma = step.config.certified_loss, step.config.awp_gamma
    assert kind is not None
    assert gamma is not None
    loss, region = full_loss(step, kind)
    if not step.certifies or gamma == 0.0:
        yield loss
        return
    deltas = ascent(loss, step.params, gamma)
    perturbed = replace(step, params=perturb.apply(step.params, deltas), statistics={}, adversarial_statistics={})
    yield full_loss(perturbed, kind, region=region)[0]


def ascent(loss: Tensor, params: Params, gamma: float) -> Params:
    """``gamma * ||w|| * d / ||d||`` for every tensor of more than one dimension, d the gradient; by name, detached."""
    weights = {name: tensor for name, tensor in params.items() if tensor.requires_grad and tensor.dim() > 1}
    found = {}
    for (name, weight), d in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
        found[name] = gamma * weight.detach().norm() * d / d.norm().clamp(min=1e-20)
    return found
