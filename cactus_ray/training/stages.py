"""The stages of a method: which epochs they take, what each of them trains, and which network its tensors stand for.

Every stage is a training of its own: it starts with a fresh optimiser over its own leaves, and the learning rate falls
at the same fractions of its steps. Epsilon and the standard weight ramp in the first stage and then stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cactus_ray.bounds.graph import Graph, Params, is_buffer
from cactus_ray.config import RunConfig
from cactus_ray.training.step import Step


def weights_and_biases(graph: Graph, name: str) -> bool:
    """Whether ``name`` is a tensor of the network that is trained; no auxiliary one has a name that ends like these."""
    return name.rsplit(".", 1)[-1] in ("weight", "bias")


def as_they_are(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> Params:
    """The network of a stage that changes no tensors."""
    return params


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. ``auxiliary``: a method's own tensors by name (scores, masks, factors, ranges), saved with the run.

    trains(graph, name): whether the optimiser moves this tensor of the network or auxiliary one.

    begin(config, graph, params, auxiliary), before the first step: changes both dicts in place (no gradients flow).
    Must depend on its arguments only; then workers agree, and a resumed run is the same.

    network(config, graph, params, auxiliary): the tensors that losses, attacks and bounds see, differentiable in the
    leaves; buffers as they are. With anything but ``as_they_are`` the method must give one loss, since its backward
    pass frees what leads from the leaves to the network. Without gradients: what is scored, kept and exported.

    after(step): after every move of the optimiser, without gradients; may change ``step.auxiliary``'s tensors and,
    in place, leaves of the network (projections).
    """

    name: str = ""
    trains: Callable[[Graph, str], bool] = weights_and_biases
    begin: Callable[[RunConfig, Graph, Params, Params], None] | None = None
    network: Callable[[RunConfig, Graph, Params, Params], Params] = as_they_are
    after: Callable[[Step], None] | None = None


WHOLE: tuple[Stage, ...] = (Stage(),)
"""The one stage of a method without stages."""


@dataclass(frozen=True, slots=True)
class Span:
    """The epochs of a stage: from ``first`` (counted from 0) up to ``end``, which is excluded."""

    first: int
    end: int


def spans(shares: Sequence[float] | None, epochs: int) -> tuple[Span, ...]:
    """Whole epochs for every stage in proportion to ``shares``, at least one each; together all ``epochs``.

    None: one stage. ``epochs`` is at least the number of shares.
    """
    shares = shares or (1.0,)
    ends = [0]
    for index in range(1, len(shares) + 1):
        ideal = round(epochs * sum(shares[:index]) / sum(shares))
        ends.append(min(max(ideal, ends[-1] + 1), epochs - len(shares) + index))
    return tuple(Span(first, end) for first, end in itertools.pairwise(ends))


@torch.no_grad()
def begin(stage: Stage, config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> tuple[Params, Params]:
    """The run's tensors at the start of ``stage``, sorted by name; leaves as ``stage`` trains them."""
    if stage.begin is not None:
        stage.begin(config, graph, params, auxiliary)
    return prepared(stage, graph, params), prepared(stage, graph, auxiliary)


def prepared(stage: Stage, graph: Graph, tensors: Params) -> Params:
    """``tensors`` by sorted name, those that ``stage`` trains as leaves that require gradients.

    Sorted, because the sum behind the gradient's norm depends on the order, and a saved state knows no other.
    """
    found = {}
    for name, tensor in sorted(tensors.items()):
        trained = stage.trains(graph, name) and not is_buffer(name)
        found[name] = tensor.detach().clone().requires_grad_(trained)
    return found
