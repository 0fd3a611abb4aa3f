"""From a configuration to a network with its first weights."""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cactus_ray.bounds.trace import trace
from cactus_ray.config import ModelConfig, RunConfig
from cactus_ray.errors import ConfigError, UserError
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
_GLOBAL_GENERATOR = threading.Lock()


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
    if normalization is None:
        normalization = ((0.5,) * input_shape[0], (0.25,) * input_shape[0])
    make = None if config.factory is None else _factory(config.factory, trust_code=trust_code)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    # Initialisers of torch.nn read the global generator, so it is lent to them seeded and then put back: to one thread
    # at a time, or two would draw from one another's.
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if make is None:
            return ARCHITECTURES[str(config.name)](config, input_shape, classes, normalization)
        return _call(make, str(config.factory), input_shape, classes)


def create(
    config: RunConfig,
    input_shape: tuple[int, ...],
    classes: int,
    class_names: tuple[str, ...] = (),
    trust_code: bool = False,
) -> Network:
    """The untrained network of a run: float32 on the CPU, a function of ``config.seed`` and the architecture.

    Raises UnsupportedGraphError that names an operator the bounds do not understand, and UserError as ``build`` does
    or where the logits are not [N, classes].
    """
    digest = hashlib.sha256(f"{config.seed}/initial weights".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    module = build(
        config.model,
        input_shape,
        classes,
        generator=generator,
        trust_code=trust_code,
        normalization=NORMALIZATION[config.data.name],
    )
    if config.model.factory is not None:
        module = module.to("cpu", torch.float32)
        _try_out(module, config.model.factory, input_shape, classes)
    graph, params = trace(module, input_shape)
    return Network(graph, params, config, class_names)


def _factory(path: str, *, trust_code: bool) -> Callable[..., Any]:
    """The function that ``package.module:function`` names."""
    wanted = "package.module:function, a function of (input_shape, classes) that returns a torch module"
    module_name, colon, function_name = path.partition(":")
    if not (colon and function_name.isidentifier() and all(p.isidentifier() for p in module_name.split("."))):
        raise ConfigError("model.factory", path, wanted)
    if not trust_code:
        raise UserError(
            f"model.factory: {path!r} would run code of yours; expected --trust-code on the command line to allow it"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything; the cause keeps its traceback
        raise UserError(
            f"model.factory: {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"expected {wanted}, on the Python path"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError("model.factory", path, f"{wanted}; {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _call(make: Callable[..., Any], path: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    try:
        module = make(input_shape, classes)
    except Exception as error:  # the user's function may raise anything; the cause keeps its traceback
        raise UserError(
            f"model.factory: {path}({input_shape}, {classes}) failed ({type(error).__name__}: {error}); "
            "expected a torch module"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f"model.factory: {path} returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def _try_out(module: nn.Module, path: str, input_shape: tuple[int, ...], classes: int) -> None:
    """Refuse a network of the wrong shape before anything is trained; leaves batch-norm statistics alone."""
    was_training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, *input_shape))
    except Exception as error:  # the user's forward may raise anything; the cause keeps its traceback
        raise UserError(
            f"model.factory: {path} fails on images [2, {', '.join(map(str, input_shape))}] "
            f"({type(error).__name__}: {error}); expected logits [2, {classes}]"
        ) from error
    finally:
        module.train(was_training)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, classes):
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"model.factory: {path} gives logits {shape} for 2 images; expected [2, {classes}]")
