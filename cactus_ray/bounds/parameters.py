"""Parameters of a torch module for which copies of its tensors cannot stand: computed ones and shared ones."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cactus_ray.errors import UnsupportedGraphError

_REMEDIES: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove",
}
"""Hooks that compute a tensor before every forward, and the functions that make it a plain parameter."""


def refuse_computed(module: nn.Module) -> None:
    """Raise UnsupportedGraphError for a tensor that a layer computes from others, with the call that makes it plain."""
    for name, part in module.named_modules():
        layer = f"{parametrize.type_before_parametrizations(part).__name__} {name!r}"
        if parametrize.is_parametrized(part):
            parametrizations = cast(nn.ModuleDict, part.parametrizations)
            tensor, steps = next(iter(parametrizations.items()))
            how = ", ".join(type(step).__name__.lstrip("_") for step in cast(nn.ModuleList, steps))
            raise _computed(layer, tensor, how, "torch.nn.utils.parametrize.remove_parametrizations")
        for hook in part._forward_pre_hooks.values():
            for kind, remedy in _REMEDIES.items():
                if isinstance(hook, kind):
                    tensor = str(getattr(hook, "_tensor_name" if kind is BasePruningMethod else "name"))
                    raise _computed(layer, tensor, type(hook).__name__, remedy)
        if isinstance(part, nn.Linear | nn.Conv2d) and not isinstance(part.weight, nn.Parameter):
            raise UnsupportedGraphError(f"{layer}: its weight is no parameter; expected weight = nn.Parameter(...)")


def refuse_shared(module: nn.Module) -> None:
    """Raise UnsupportedGraphError where two layers have one tensor: its copies would be trained apart."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, part in module.named_modules():
        for key, parameter in part.named_parameters(name, recurse=False):
            if is_lazy(parameter) or parameter.is_meta or parameter.numel() == 0:
                continue
            place = (parameter.device, parameter.data_ptr())
            if place in seen:
                raise UnsupportedGraphError(
                    f"parameters {seen[place]!r} and {key!r} are one tensor; weights cannot be shared between layers: "
                    "expected a tensor of its own for each layer"
                )
            seen[place] = key


def _computed(layer: str, tensor: str, how: str, remedy: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"{layer}: its {tensor} is computed in every forward ({how}), which training would lose; expected a plain "
        f'parameter: call {remedy}(layer, "{tensor}") in the factory'
    )
