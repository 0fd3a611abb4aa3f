"""The optional engine: bounds by auto_LiRPA (Xu et al. 2020, 2021), for comparison and as a second opinion.

It is never required: its releases on the package index do not run on today's torch, so it is installed from upstream
(``INSTALL``). Only this file imports it. Bounds hold in real arithmetic; upstream charges no rounding.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import RELUS, Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.trace import trace
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.verification.engine import EngineInfo
from cactus_ray.verification.module import GraphModule

INSTALL = (
    "pip install --no-deps git+https://github.com/Verified-Intelligence/auto_LiRPA && "
    "pip install appdirs tqdm graphviz packaging pyyaml sortedcontainers onnx"
)


@functools.cache
def upstream() -> ModuleType:
    """The package auto_LiRPA. Raises UserError that says how to install it.

    Its import changes the process's warning filters, logging and recursion limit; all are put back. (With its limit of
    a million, deeply nested JSON ends the process.)
    """
    handlers, level, depth = logging.root.handlers[:], logging.root.level, sys.getrecursionlimit()
    try:
        with warnings.catch_warnings(record=True):  # not a filter: the import replaces those
            return importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise UserError(
            f"verification.engine: got 'auto_lirpa', but auto_LiRPA cannot be imported ({error}); "
            f"expected it installed:\n  {INSTALL}"
        ) from error
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        sys.setrecursionlimit(depth)


class LirpaEngine:
    """auto_LiRPA bound to one network; see ``engine.Engine`` for what its answers guarantee.

    Raises UserError where upstream is not installed, UnsupportedGraphError where it cannot bound the network.
    """

    def __init__(self, graph: Graph, params: Params) -> None:
        package = upstream()
        _check_operators(graph)
        self.graph, self.params = graph, params
        like = next(t for t in params.values() if t.is_floating_point())
        self.dtype = like.dtype
        example = torch.rand(2, *graph.input_shape, generator=torch.Generator().manual_seed(0), dtype=self.dtype)
        example = example.to(like.device)
        self.classes = graph.shapes(params)[graph.output.name][0]
        # upstream does not bound a normalisation in its patches; an interval goes through it exactly
        self.normalize = next((n for n in graph.nodes[1:2] if n.op == "scale_shift"), None)
        module = GraphModule(graph, params, skip=self.normalize)
        options = {"conv_mode": "patches" if fits_patches(graph) else "matrix", "disable_optimization": ["maxpool"]}
        with torch.no_grad(), scope(self.dtype):
            try:
                start = self._inside(Box(example, torch.zeros_like(example))).center
                self.bounded: Any = package.BoundedModule(module, start, options, device=like.device)
                found = self.bounded(start)
            except NotImplementedError as error:
                raise UnsupportedGraphError(f"auto_LiRPA cannot bound this network: {error}") from error
        if not torch.allclose(found, forward(graph, params, example), rtol=1e-3, atol=1e-4, equal_nan=True):
            raise UnsupportedGraphError("auto_LiRPA computes something else than the network itself")

    @property
    def info(self) -> EngineInfo:
        """Upstream's name and version, and whether its alpha moves."""
        return info()

    def interval_margins(self, box: Box, labels: Tensor) -> Tensor:
        """Upstream's method IBP."""
        return self._margins("IBP", box, labels)

    def linear_margins(
        self, box: Box, labels: Tensor, *, known: Tensor | None = None, effort: Effort = linear.FULL_EFFORT
    ) -> Tensor:
        """Upstream's methods CROWN, or CROWN-IBP; ``effort.rows`` and ``effort.deadline`` have no counterpart there."""
        method = "CROWN" if effort.intermediate == "crown" else "CROWN-IBP"
        return self._improve(method, box, labels, known)

    def alpha_margins(
        self,
        box: Box,
        labels: Tensor,
        *,
        known: Tensor | None = None,
        effort: Effort = linear.FULL_EFFORT,
        iterations: int = 20,
    ) -> Tensor:
        """Upstream's method CROWN-Optimized with its own defaults: slopes optimised for the margins only."""
        arguments = {**self.bounded.bound_opts["optimize_bound_args"], "iteration": iterations}
        self.bounded.set_bound_opts({"optimize_bound_args": arguments})
        return self._improve("CROWN-Optimized", box, labels, known)

    def margins_over(self, boxes: Mapping[str, Box], labels: Tensor) -> Tensor:
        """One backward pass over upstream's relaxations on these boxes."""
        readers = [n for n in self.graph.nodes if n.op in RELUS]
        if len(readers) != len(self.bounded.relus):
            raise UnsupportedGraphError(f"{len(readers)} ReLUs, but auto_LiRPA sees {len(self.bounded.relus)}")
        given = {}
        for ours, theirs in zip(readers, self.bounded.relus, strict=True):
            box = boxes[ours.inputs[0]]
            given[theirs.inputs[0].name] = (box.lower, box.upper)
        return self._margins("CROWN", boxes[self.graph.nodes[0].name], labels, interm_bounds=given)

    def _improve(self, method: str, box: Box, labels: Tensor, known: Tensor | None) -> Tensor:
        """Margins of the samples that ``known`` leaves open; never below ``known``."""
        if known is None:
            known = self.interval_margins(box, labels)
        open_samples = (~(known > 0)).scatter(1, labels[:, None], False).any(1).nonzero()[:, 0]
        if len(open_samples) == 0:
            return known
        part = Box(box.center[open_samples], box.radius[open_samples])
        found, old = self._margins(method, part, labels[open_samples]), known[open_samples]
        # a comparison with NaN is false: a NaN of either bound survives
        better = torch.where((old >= found) | torch.isnan(old) | (old > 0), old, found)
        return known.index_put((open_samples,), better)

    def _inside(self, box: Box) -> Box:
        """The box behind the network's normalisation, where upstream's network begins."""
        return box if self.normalize is None else interval.step(self.normalize, self.params, [box])

    def _margins(self, method: str, box: Box, labels: Tensor, **options: Any) -> Tensor:
        point, differences, others = self.question(box, labels)
        with torch.set_grad_enabled(method == "CROWN-Optimized"), scope(self.dtype):
            found = self.bounded.compute_bounds(x=(point,), C=differences, method=method, bound_upper=False, **options)
        lower: Tensor = found[0]
        return lower.new_zeros(len(labels), self.classes).scatter(1, others, lower.detach())

    def question(self, box: Box, labels: Tensor) -> tuple[Any, Tensor, Tensor]:
        """What ``compute_bounds`` is asked: its input, the rows of the margins, and their classes [N, classes - 1]."""
        package, box = upstream(), self._inside(box)
        norm = package.PerturbationLpNorm(norm=float("inf"), x_L=box.lower, x_U=box.upper)
        eye = torch.eye(self.classes, dtype=box.center.dtype, device=box.center.device)
        others = torch.arange(self.classes, device=labels.device).expand(len(labels), -1)
        others = others[others != labels[:, None]].view(len(labels), -1)
        return package.BoundedTensor(box.center, norm), eye[labels][:, None] - eye[others], others


def _check_operators(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "quantize":
            raise UnsupportedGraphError(f"quantiser {node.name!r}: auto_LiRPA has no such operator; use engine cactus")
        if node.op == "max_pool2d" and node["kernel"] != node["stride"]:
            raise UnsupportedGraphError(f"max pooling {node.name!r}: auto_LiRPA needs a stride equal to its kernel")


def fits_patches(graph: Graph) -> bool:
    """Whether upstream's windows ("patches") are right for the network; its dense matrices always are, slowly.

    In 0.7.1 they give wrong (too narrow) boxes behind dilated and grouped convolutions and fail on unequal strides,
    max pooling and scaling.
    """
    for node in graph.nodes[2:]:
        if node.op in ("max_pool2d", "scale_shift") or not node.attributes.get("count_include_pad", True):
            return False
    return all(
        node["dilation"] == (1, 1) and node["groups"] == 1 for node in graph.nodes if node.op == "conv2d"
    ) and all(len(set(n[key])) == 1 for n in graph.nodes for key in ("stride", "padding") if key in n.attributes)


# --- the gradient of alpha -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def scope(dtype: torch.dtype, *, quiet: bool = True) -> Iterator[None]:
    """What upstream needs around every call; all of it is undone afterwards.

    Some of its operators make tensors of the default dtype; it prints (kept away if ``quiet``); its alpha needs a
    mended clamp.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    silence = contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), silence, _inclusive_alpha():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _inclusive_alpha() -> Iterator[None]:
    """Where clamp has no gradient at its ends (torch >= 2.14, pytorch issue 195931), give upstream's slopes one.

    They start at exactly 0 or 1 and would never move. Does nothing where upstream no longer has the method that clamps;
    the self-test tells whether alpha moves.
    """
    relu = importlib.import_module("auto_LiRPA.operators.relu").BoundRelu
    original = relu.__dict__.get("_relu_mask_alpha")
    if original is None or not clamp_is_dead_at_its_ends():
        yield
        return

    def masked(
        lower: Tensor, upper: Tensor, lower_slope: Tensor | None, upper_slope: Tensor | None, leaky_alpha: float = 0
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        detached = (None if s is None else s.detach() for s in (lower_slope, upper_slope))
        *values, zero = original.__func__(lower, upper, *detached, leaky_alpha=leaky_alpha)
        unstable = (lower < 0) & (upper > 0)
        found = [
            value if slope is None else _with_gradient(value, slope, unstable & (slope >= leaky_alpha) & (slope <= 1))
            for value, slope in zip(values, (lower_slope, upper_slope), strict=True)
        ]
        return found[0], found[1], zero

    relu._relu_mask_alpha = staticmethod(masked)
    try:
        yield
    finally:
        relu._relu_mask_alpha = original


def _with_gradient(value: Tensor, slope: Tensor, inside: Tensor) -> Tensor:
    """``value``, with the gradient 1 with respect to ``slope`` where ``inside``, else 0."""
    return value + torch.where(inside, slope - slope.detach(), torch.zeros_like(slope))


def clamp_is_dead_at_its_ends() -> bool:
    """Whether this torch's clamp has gradient 0 at its very ends."""
    x = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(x.clamp(0.0, 1.0), x)
    return float(gradient) == 0.0


@functools.cache
def info() -> EngineInfo:
    """Upstream's version, and whether CROWN-Optimized beats CROWN on a toy network: "alpha moves" or "alpha frozen".

    A frozen alpha is sound, but no tighter than CROWN. Tested once per process. Raises UserError without upstream.
    """
    package = upstream()
    graph, params = _toy()
    engine = LirpaEngine(graph, params)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, *graph.input_shape, generator=generator, dtype=torch.float64)
    box, labels = interval.ball(images, 0.15, (0.0, 1.0)), torch.arange(4) % 3
    nothing = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    crown = engine.linear_margins(box, labels, known=nothing).mean()
    optimised = engine.alpha_margins(box, labels, known=nothing, iterations=10).mean()
    moves = bool(optimised > crown + 1e-3 * crown.abs())
    figures = f"mean margin {float(crown):.4f} by CROWN, {float(optimised):.4f} by CROWN-Optimized"
    return EngineInfo("auto_LiRPA", package.__version__, f"alpha {'moves' if moves else 'frozen'}: {figures}")


def _toy() -> tuple[Graph, Params]:
    """Four linear layers with fixed weights, float64."""
    widths = (16, 20, 20, 20, 3)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    graph, params = trace(nn.Sequential(*layers[:-1]), (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    return graph, {
        k: torch.randn(v.shape, generator=generator, dtype=torch.float64) / v[0].numel() ** 0.5
        for k, v in params.items()
    }
