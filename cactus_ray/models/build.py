"""From a configuration to a network with its first weights."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, replace

import torch
from torch import nn

from cactus_ray.bounds.graph import trainable
from cactus_ray.bounds.parameters import refuse_computed
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ModelConfig, RunConfig
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.models import own
from cactus_ray.models.architectures import ARCHITECTURES, Normalization
from cactus_ray.models.network import Network

NORMALIZATION: dict[str, Normalization] = {
    "digits": ((0.3055,), (0.3762,)),  # of the training split
    "mnist": ((0.1307,), (0.3081,)),  # the literature's constants, of the 60,000 training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # the literature's constants
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),  # the literature's constants
    "image_folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
}
"""Mean and deviation per channel, for the architectures that normalise their input. Fixed, never learnt from data."""
_GLOBAL_GENERATOR = threading.RLock()
"""Held while layers are made; again by the same thread where a factory builds a part of its network with ``build``."""


@dataclass(frozen=True, slots=True)
class Untrained:
    """A network before training. Names of its tensors:

    ``given``: weights that a factory set itself, so that no other initialisation may replace them.
    ``frozen``: those with ``requires_grad=False``, which training leaves as they are.
    """

    network: Network
    given: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


def build(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    generator: torch.Generator,
    trust_code: bool = False,
    normalization: Normalization | None = None,
) -> nn.Module:
    """A fresh module for images of ``input_shape`` with torch's own initialisation, drawn from ``generator``.

    Torch's global generator is left as it was. ``normalization`` defaults to mean 0.5 and deviation 0.25. Raises
    UserError for a ``factory`` without ``trust_code``, one that cannot be found or called, or returns no module.
    """
    return _build(config, input_shape, classes, generator, trust_code, normalization)[0]


def _build(
    config: ModelConfig, input_shape: tuple[int, ...], classes: int, generator: torch.Generator, trust_code: bool,
    normalization: Normalization | None,
) -> tuple[nn.Module, frozenset[str]]:  # fmt: skip
    """The module of ``build``, and of a factory's the digests of the weights that torch drew for it."""
    if normalization is None:
        normalization = ((0.5,) * input_shape[0], (0.25,) * input_shape[0])
    make = None if config.factory is None else own.factory_of(config.factory, trust_code=trust_code)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    # Initialisers of torch.nn read the global generator, so it is lent to them seeded and then put back: to one thread
    # at a time, or two would draw from one another's.
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if make is None:
            return ARCHITECTURES[str(config.name)](config, input_shape, classes, normalization), frozenset()
        return own.made(make, str(config.factory), input_shape, classes, seed)


def create(
    config: RunConfig,
    input_shape: tuple[int, ...],
    classes: int,
    class_names: tuple[str, ...] = (),
    trust_code: bool = False,
) -> Network:
    """The untrained network of a run: float32 on the CPU, a function of ``config.seed`` and the architecture.

    Raises as ``untrained`` does.
    """
    return untrained(config, input_shape, classes, class_names, trust_code).network


def untrained(
    config: RunConfig,
    input_shape: tuple[int, ...],
    classes: int,
    class_names: tuple[str, ...] = (),
    trust_code: bool = False,
) -> Untrained:
    """The network of ``create``, and which of its tensors its factory wants left alone.

    Raises UnsupportedGraphError that names an operator the bounds do not understand, and UserError as ``build`` does,
    where the logits are not [N, classes], and for what training would lose in silence (``own.refuse_lost``).
    """
    digest = hashlib.sha256(f"{config.seed}/initial weights".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    normalization = NORMALIZATION[config.data.name]
    module, drawn = _build(config.model, input_shape, classes, generator, trust_code, normalization)
    path = config.model.factory
    if path is None:
        return Untrained(Network(*trace(module, input_shape), config, class_names))
    try:
        refuse_computed(module)  # first, because some are computed by hooks
        own.refuse_lost(module, path)
        module = own.float32_on_cpu(module, path)
        own.try_out(module, path, input_shape, classes)
        graph, params = trace(module, input_shape)
    except UnsupportedGraphError as error:
        raise UnsupportedGraphError(f"model.factory: {path}: {error}") from error
    weights = [f"{node.name}.weight" for node in graph.weighted()]
    fixed = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    given = frozenset(name for name in weights if own.digest(params[name]) not in drawn)
    if trainable(params).keys() <= fixed:
        raise UserError(
            f"model.factory: {path} gives a network with nothing to train; expected a parameter with requires_grad=True"
        )
    return Untrained(Network(graph, params, config, class_names), given, frozenset(fixed & params.keys()))


def checked(
    config: RunConfig,
    input_shape: tuple[int, ...],
    classes: int,
    class_names: tuple[str, ...] = (),
    trust_code: bool = False,
) -> Untrained:
    """``untrained``, of a factory that gives the same network for the same seed, and the same layers for every seed.

    For the start of a run, because it calls a factory three times. Raises UserError for any other factory.
    """
    found = untrained(config, input_shape, classes, class_names, trust_code)
    if config.model.factory is None:
        return found
    path = config.model.factory
    again = untrained(config, input_shape, classes, class_names, trust_code).network
    other = untrained(replace(config, seed=config.seed ^ 1), input_shape, classes, class_names, trust_code).network
    shapes = {name: list(tensor.shape) for name, tensor in found.network.params.items()}
    for network in (again, other):
        if network.graph != found.network.graph or shapes != {k: list(v.shape) for k, v in network.params.items()}:
            raise UserError(
                f"model.factory: {path} gives other layers at every call; expected the same for every seed, a function "
                "of (input_shape, classes)"
            )
    for name, tensor in found.network.params.items():
        if not torch.equal(tensor, again.params[name]):
            raise UserError(
                f"model.factory: {path} gives other values of {name!r} at a second call with the same seed; expected "
                "random values from the global generators of torch, numpy or random, which are seeded before each call"
            )
    return found
