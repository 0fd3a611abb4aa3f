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
from cactus_ray.training.workers import Workers


def awp(step: Step) -> Iterator[Tensor]:
    """The loss at weights that raise it; its gradient moves the weights themselves (Wu et al. 2020, Eq. 9-11).

    One ascent step from the weights, as in the authors' code, as soon as the certified loss has a weight. The attack is
    shared by both passes. Workers ascend together, on the mean of their gradients. Running statistics follow the
    unperturbed network (in the authors' code the perturbed one), since that is what is deployed.
    """
    kind, gamma = step.config.certified_loss, step.config.awp_gamma
    assert kind is not None
    assert gamma is not None
    loss, region = full_loss(step, kind)
    if not step.certifies or gamma == 0.0:
        yield loss
        return
    deltas = ascent(loss, step.params, gamma, step.workers)
    perturbed = replace(step, params=perturb.apply(step.params, deltas), statistics={}, adversarial_statistics={})
    yield full_loss(perturbed, kind, region=region)[0]


def ascent(loss: Tensor, params: Params, gamma: float, workers: Workers | None = None) -> Params:
    """``gamma * ||w|| * d / ||d||`` for every tensor of more than one dimension; by name, detached.

    d is the gradient, with ``workers`` the mean of theirs.
    """
    weights = {name: tensor for name, tensor in params.items() if tensor.requires_grad and tensor.dim() > 1}
    found = {}
    gradients = list(torch.autograd.grad(loss, list(weights.values())))
    if workers is not None:
        workers.mean_(gradients)
    for (name, weight), d in zip(weights.items(), gradients, strict=True):
        found[name] = gamma * weight.detach().norm() * d / d.norm().clamp(min=1e-20)
    return found
