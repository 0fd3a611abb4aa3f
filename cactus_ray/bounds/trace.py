"""From a torch module to a graph: what the bounds understand, and a refusal by name of everything else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from cactus_ray.bounds.graph import Graph, Node, Params, apply_node, forward, slope_of
from cactus_ray.bounds.parameters import refuse_computed, refuse_shared
from cactus_ray.errors import UnsupportedGraphError

PATCHED = threading.Lock()
"""Held while torch.fx traces, and while modules are called: it replaces ``Module.__call__`` for all threads."""

UNDERSTOOD = (
    "Linear, Conv2d, BatchNorm1d, BatchNorm2d, ReLU, LeakyReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, "
    "Identity, the sum of two branches, and Normalize of cactus_ray.models (a factor and a summand per channel)"
)
"""What a network may be made of, in the words of an error."""
_TRAINING_ONLY = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "dropout")


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Graph, Params]:
    """Graph and tensors (detached copies) of a module whose forward is static.

    Understood: ``UNDERSTOOD``, with slopes of LeakyReLU in [0, 1], adaptive pooling to a divisor of its input, and any
    module with tensors ``scale`` and ``shift`` that says ``is_scale_shift = True`` as ``Normalize`` does. The module
    is read as it is in training mode, and left in the mode that it was in. Raises UnsupportedGraphError that names
    anything else, a weight that is computed from other tensors, and one that belongs to two layers.
    """
    refuse_computed(module)
    refuse_shared(module)
    with PATCHED, in_mode(module, training=True):  # what runs in training must not be lost
        try:
            traced = _Tracer().trace(module)
        except UnsupportedGraphError:
            raise
        except Exception as error:
            raise UnsupportedGraphError(
                f"{type(module).__name__}.forward cannot be traced ({error}); "
                "expected operators that do not depend on the values of tensors or on the shapes of images"
            ) from error
    builder = _Builder(module, tuple(input_shape))
    for node in traced.nodes:
        builder.add(node)
    graph = Graph(tuple(builder.nodes), tuple(input_shape))
    with PATCHED:  # it calls the module
        _check(module, graph, builder.params)
    return graph, builder.params


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Every part of ``module`` in training mode, or in evaluation mode, inside the block; each as it was after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _not_understood(what: str, kind: str = "") -> str:
    dropped = "; certified training has no dropout: leave it out" if kind in _TRAINING_ONLY else ""
    return f"{what} is not understood{dropped}; expected {UNDERSTOOD}"


class _Tracer(fx.Tracer):
    """Input normalisation stays one node, as the layers of torch.nn do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "is_scale_shift", False) or super().is_leaf_module(m, module_qualified_name)


class _Builder:
    """Turns fx nodes into ours; aliases (Identity, the size in ``view(x.size(0), -1)``) leave no node behind."""

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.modules = dict(module.named_modules())
        self.nodes: list[Node] = []
        self.params: Params = {}
        self.alias: dict[str, str] = {}
        self.batch_sizes: set[str] = set()
        self.values: dict[str, Tensor] = {}
        self.input_shape = input_shape

    def add(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                if self.nodes:
                    raise UnsupportedGraphError(f"a second input {node.name!r}; networks have one input")
                self._append(node, Node("input", "input"))
            case "call_module":
                self._module(node, self.modules[str(node.target)])
            case "call_function" | "call_method":
                self._call(node)
            case "output":
                last = node.args[0]
                if not isinstance(last, fx.Node) or self.alias[last.name] != self.nodes[-1].name:
                    raise UnsupportedGraphError("the network must return exactly one tensor, its logits")
            case _:
                raise UnsupportedGraphError(_not_understood(f"tensor {node.target!r} that forward uses by itself"))

    def _append(self, source: fx.Node, node: Node) -> None:
        if any(n.name == node.name for n in self.nodes):
            raise UnsupportedGraphError(f"module {node.name!r} is used twice; weights cannot be shared between layers")
        self.nodes.append(node)
        self.alias[source.name] = node.name
        inputs = [self.values[i] for i in node.inputs]
        slope_of(node)  # refuses a leaky ReLU whose slope the bounds do not understand
        x = torch.zeros(1, *self.input_shape)
        with torch.no_grad():
            self.values[node.name] = x if node.op == "input" else apply_node(node, _cpu_float(self.params), inputs)

    def _input(self, node: fx.Node, position: int = 0) -> str:
        argument = node.args[position]
        if not isinstance(argument, fx.Node):
            target = getattr(node.target, "__name__", node.target)
            raise UnsupportedGraphError(
                _not_understood(f"{target} (node {node.name!r}) with the constant {argument!r}")
            )
        return self.alias[argument.name]

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name, kind = str(node.target), type(module).__name__
        if isinstance(module, nn.Identity):
            self.alias[node.name] = self._input(node)
            return
        if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.Flatten | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            name = node.name  # no tensors: the same module may be used many times
        inputs = (self._input(node),)
        attributes: dict[str, Any] = {}
        match module:
            case nn.Conv2d():
                if module.padding_mode != "zeros" or isinstance(module.padding, str):
                    raise UnsupportedGraphError(f"Conv2d {name!r}: padding must be zeros, given as numbers")
                op = "conv2d"
                attributes = {
                    "stride": tuple(module.stride), "padding": tuple(module.padding),
                    "dilation": tuple(module.dilation), "groups": module.groups,
                }  # fmt: skip
            case nn.Linear():
                op = "linear"
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                if not module.track_running_stats or module.momentum is None:
                    raise UnsupportedGraphError(f"{kind} {name!r}: needs running statistics and a momentum")
                op, attributes = "batch_norm", {"eps": module.eps, "momentum": module.momentum}
            case nn.ReLU():
                op = "relu"
            case nn.LeakyReLU():
                op, attributes = "leaky_relu", {"slope": _single(module.negative_slope)}
            case nn.Flatten():
                if (module.start_dim, module.end_dim) != (1, -1):
                    raise UnsupportedGraphError(f"Flatten {name!r}: only start_dim=1, end_dim=-1")
                op = "flatten"
            case nn.MaxPool2d():
                if module.dilation not in (1, (1, 1)) or module.ceil_mode or module.return_indices:
                    raise UnsupportedGraphError(f"MaxPool2d {name!r}: dilation, ceil_mode or indices")
                op, attributes = "max_pool2d", _pool(module.kernel_size, module.stride, module.padding)
            case nn.AvgPool2d():
                if module.ceil_mode or module.divisor_override:
                    raise UnsupportedGraphError(f"AvgPool2d {name!r}: ceil_mode or divisor_override")
                attributes = _pool(module.kernel_size, module.stride, module.padding)
                op, attributes["count_include_pad"] = "avg_pool2d", module.count_include_pad
            case nn.AdaptiveAvgPool2d():
                op, attributes = "avg_pool2d", self._adaptive(name, inputs[0], module.output_size)
            case _ if getattr(module, "is_scale_shift", False):
                op = "scale_shift"
            case _:
                raise UnsupportedGraphError(_not_understood(f"module {kind} ({name!r})", kind))
        for key, tensor in list(module.named_parameters()) + list(module.named_buffers()):
            if key != "num_batches_tracked":
                self.params[f"{name}.{key}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._append(node, Node(name, op, inputs, attributes))

    def _call(self, node: fx.Node) -> None:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if self._is_batch_size(node, target):
            return
        if target in ("add", "iadd", "add_"):
            if node.kwargs:
                raise UnsupportedGraphError(f"add with {dict(node.kwargs)!r}")
            self._append(node, Node(node.name, "add", (self._input(node, 0), self._input(node, 1))))
        elif target in ("relu", "relu_"):
            self._append(node, Node(node.name, "relu", (self._input(node),)))
        elif target in ("leaky_relu", "leaky_relu_"):
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            self._append(node, Node(node.name, "leaky_relu", (self._input(node),), {"slope": _single(slope)}))
        elif self._is_flatten(node, target):
            self._append(node, Node(node.name, "flatten", (self._input(node),)))
        elif target in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"):
            self._functional_pool(node, target)
        else:
            raise UnsupportedGraphError(_not_understood(f"function {target!r} (node {node.name!r})", target))

    def _functional_pool(self, node: fx.Node, target: str) -> None:
        inputs = (self._input(node),)
        given = dict(zip(_POOL_ARGUMENTS[target], node.args[1:], strict=False)) | dict(node.kwargs)
        if target == "adaptive_avg_pool2d":
            attributes = self._adaptive(node.name, inputs[0], given["output_size"])
            self._append(node, Node(node.name, "avg_pool2d", inputs, attributes))
            return
        if extra := {k: v for k, v in given.items() if v not in _POOL_DEFAULTS.get(k, (v,))}:
            raise UnsupportedGraphError(f"{target} (node {node.name!r}) with {extra!r}")
        attributes = _pool(given["kernel_size"], given.get("stride"), given.get("padding", 0))
        if target == "avg_pool2d":
            attributes["count_include_pad"] = given.get("count_include_pad", True)
        self._append(node, Node(node.name, target, inputs, attributes))

    def _adaptive(self, name: str, source: str, size: Any) -> dict[str, Any]:
        have, want = self.values[source].shape[-2:], _pair(size)
        if any(w is None or h % w for h, w in zip(have, want, strict=True)):
            raise UnsupportedGraphError(f"adaptive pooling {name!r} of {tuple(have)} to {want}: must divide")
        kernel = (have[0] // want[0], have[1] // want[1])
        return {"kernel": kernel, "stride": kernel, "padding": (0, 0), "count_include_pad": True}

    def _is_batch_size(self, node: fx.Node, target: str) -> bool:
        """``x.size(0)``, ``x.shape`` and ``x.shape[0]`` only serve a later ``view``."""
        if (target == "size" and node.args[1:] in ((0,), ())) or (target == "getattr" and node.args[1] == "shape"):
            self.batch_sizes.add(node.name)
            return True
        if target == "getitem" and isinstance(node.args[0], fx.Node) and node.args[0].name in self.batch_sizes:
            if node.args[1] != 0:
                return False
            self.batch_sizes.add(node.name)
            return True
        return False

    def _is_flatten(self, node: fx.Node, target: str) -> bool:
        """``flatten(1)``, or ``view`` and ``reshape`` to [batch size or -1, all values of a sample or -1]."""
        if target == "flatten":
            return (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))
        if target not in ("view", "reshape") or node.kwargs:
            return False
        rest = node.args[1:]
        if len(rest) == 1 and isinstance(rest[0], tuple | list):
            rest = tuple(rest[0])
        if len(rest) != 2:
            return False
        first, values = rest[0], self.values[self._input(node)][0].numel()
        if isinstance(first, fx.Node) and first.name in self.batch_sizes:
            return bool(rest[1] in (-1, values))
        return bool(first == -1 and rest[1] == values)


_POOL_ARGUMENTS = {
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("output_size",),
}
_POOL_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,), "divisor_override": (None,),
}  # fmt: skip


def _check(module: nn.Module, graph: Graph, params: Params) -> None:
    """Refuse a graph that does not compute what the module computes in evaluation."""
    like = next((t for t in params.values() if t.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *graph.input_shape, generator=generator, dtype=torch.float64).to(like)
    with torch.no_grad(), in_mode(module, training=False):
        wanted, found = module(x), forward(graph, params, x)
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        returned = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise UnsupportedGraphError(
            f"{type(module).__name__} returns {returned} in evaluation and {list(found.shape)} in training; "
            "expected the same, for forward must not depend on self.training"
        )
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise UnsupportedGraphError(
            f"{type(module).__name__} computes something else in evaluation than its traced operators (difference "
            f"{float((wanted - found).abs().max()):.3g}); a scale-and-shift module must compute x * scale + shift, and "
            "forward must not depend on self.training"
        )


def _cpu_float(params: Params) -> Params:
    return {k: v.cpu().float() for k, v in params.items()}


def _single(value: Any) -> Any:
    """A slope as float32, as torch and the runtimes compute with it; anything but a number as it is."""
    return torch.tensor(value, dtype=torch.float32).item() if isinstance(value, int | float) else value


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)  # type: ignore[return-value]


def _pool(kernel: Any, stride: Any, padding: Any) -> dict[str, Any]:
    return {
        "kernel": _pair(kernel),
        "stride": _pair(stride if stride is not None else kernel),
        "padding": _pair(padding),
    }
