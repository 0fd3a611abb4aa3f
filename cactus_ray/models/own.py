"""A user's own network: its factory is called, and what would be lost in silence or could not be trained is refused."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from cactus_ray.bounds.trace import PATCHED, in_mode
from cactus_ray.errors import ConfigError, UserError

Factory = Callable[..., Any]


def factory_of(path: str, *, trust_code: bool) -> Factory:
    """The function that ``package.module:function`` names. Raises UserError without ``trust_code``, and where there is
    no such function."""
    wanted = "package.module:function, a function of (input_shape, classes) that returns a torch module"
    module_name, colon, function_name = path.partition(":")
    if not (colon and function_name.isidentifier() and all(p.isidentifier() for p in module_name.split("."))):
        raise ConfigError("model.factory", path, wanted)
    if not trust_code:
        raise UserError(
            f"model.factory: {path!r} would run code of yours; expected --trust-code on the command line to allow it"
        )
    try:
        with _torch_as_it_was():
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


def made(
    make: Factory, path: str, input_shape: tuple[int, ...], classes: int, seed: int
) -> tuple[nn.Module, frozenset[str]]:
    """The factory's module, and the digests of all weights that torch's own initialisation gave while it was made.

    ``seed``: of Python's and NumPy's generators, which are put back; the caller seeds torch's. Lazy layers get their
    shapes and weights here. Raises UserError where the factory fails or returns no module.
    """
    try:
        with _torch_as_it_was(), _seeded(seed), _drawn_by_torch() as drawn:
            module = make(input_shape, classes)
            if isinstance(module, nn.Module) and any(isinstance(m, LazyModuleMixin) for m in module.modules()):
                with torch.no_grad(), PATCHED, in_mode(module, training=False):
                    module(torch.zeros(2, *input_shape))
    except Exception as error:  # the user's function may raise anything; the cause keeps its traceback
        raise UserError(
            f"model.factory: {path}({input_shape}, {classes}) failed ({type(error).__name__}: {error}); "
            "expected a torch module"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f"model.factory: {path} returned {type(module).__name__}; expected a torch.nn.Module")
    return module, frozenset(drawn)


def digest(weight: Tensor) -> str:
    """Of a weight's values as float32."""
    return hashlib.sha256(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


def float32_on_cpu(module: nn.Module, path: str) -> nn.Module:
    """The module as training takes it. Raises UserError for parameters that have no values or are no real numbers."""
    wanted = "expected real numbers, which are trained in float32"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise UserError(f"model.factory: {path}: {name!r} has no values; {wanted}")
        if tensor.is_complex():
            raise UserError(f"model.factory: {path}: {name!r} is {tensor.dtype}; {wanted}")
        if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()):
            raise UserError(f"model.factory: {path}: {name!r} holds NaN or infinite values; {wanted}")
    return module.to("cpu", torch.float32)


def refuse_lost(module: nn.Module, path: str) -> None:
    """Raise UserError for what a module does beside its layers' forwards, because training would not do it."""
    for name, part in module.named_modules():
        kind, place = type(part).__name__, f"module {name!r}" if name else "the module"
        if kind == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"model.factory: {path}: {place} is compiled; expected the module itself, without torch.compile "
                "(train.compile: step compiles the passes of training)"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise UserError(
                f"model.factory: {path}: {place} is TorchScript ({kind}); expected the torch.nn.Module it was made from"
            )
        if isinstance(part, DataParallel | DistributedDataParallel):
            raise UserError(
                f"model.factory: {path}: {place} is wrapped in {kind}; expected what it wraps, its .module "
                "(resources.workers splits batches over workers)"
            )
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks):
            raise UserError(
                f"model.factory: {path}: {place} ({kind}) has hooks, which training would not run; "
                "expected none: call .remove() on what register_..._hook returned"
            )
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and module.training and not part.training:
            raise UserError(
                f"model.factory: {path}: {place} ({kind}) alone is in evaluation mode, as if to keep its "
                "statistics; training normalises with those of every batch; expected the whole module in one mode (to "
                "keep statistics, write them as a factor and a summand per channel: cactus_ray.models.Normalize)"
            )
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"model.factory: {path}: parameter {name!r} has hooks on its gradient, which training would not run; "
                "expected none (requires_grad=False keeps a parameter as it is)"
            )


def try_out(module: nn.Module, path: str, input_shape: tuple[int, ...], classes: int) -> None:
    """Raise UserError for a network of the wrong shape; leaves batch-norm statistics alone."""
    try:
        with torch.no_grad(), PATCHED, in_mode(module, training=False):
            logits = module(torch.zeros(2, *input_shape))
    except Exception as error:  # the user's forward may raise anything; the cause keeps its traceback
        raise UserError(
            f"model.factory: {path} fails on images [2, {', '.join(map(str, input_shape))}] "
            f"({type(error).__name__}: {error}); expected logits [2, {classes}]"
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"model.factory: {path} gives logits {shape} for 2 images; expected [2, {classes}]")


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Gradients on and float32 the default inside; both as they were after it, whatever the user's code sets."""
    before = torch.get_default_dtype()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's generators with this seed inside the block, and as they were after it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _drawn_by_torch() -> Iterator[set[str]]:
    """Digests of the weights that convolutions and linear layers draw when they are made inside the block.

    By value, not by layer: it stands for a layer that is copied, and no longer for one whose weights are set later.
    """
    found: set[str] = set()
    kinds: tuple[type[Any], ...] = (_ConvNd, nn.Linear)
    originals = {kind: kind.reset_parameters for kind in kinds}

    def recording(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def reset_parameters(layer: Any) -> None:
            original(layer)
            weight = layer.weight
            if not is_lazy(weight) and not weight.is_meta and weight.is_floating_point():
                found.add(digest(weight))

        return reset_parameters

    try:
        for kind, original in originals.items():
            kind.reset_parameters = recording(original)
        yield found
    finally:
        for kind, original in originals.items():
            kind.reset_parameters = original
