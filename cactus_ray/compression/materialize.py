"""From a trained network to the one that a level would deploy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.compression import calibration as calibrate
from cactus_ray.compression import prune
from cactus_ray.compression.activations import integer_network
from cactus_ray.compression.channels import channel_groups, is_depthwise
from cactus_ray.compression.codebook import cluster
from cactus_ray.compression.factorize import split, store, without_factors
from cactus_ray.compression.levels import Level
from cactus_ray.compression.quantize import quantize, quantize_affine
from cactus_ray.compression.stored import Stored, Weight
from cactus_ray.errors import UserError
from cactus_ray.models.fold import fold_batch_norm


@dataclass(frozen=True, slots=True)
class Compressed:
    """A network at one level: no batch norm, removed channels gone, tensors as stored."""

    level: Level
    graph: Graph
    stored: dict[str, Weight]

    @property
    def params(self) -> Params:
        """Float32 tensors exactly as onnxruntime will compute them (made anew at every access)."""
        return {name: stored.tensor for name, stored in self.stored.items()}


def materialize(
    graph: Graph, params: Params, level: Level, calibration: tuple[Tensor, Tensor] | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
) -> Compressed:  # fmt: skip
    """The network that would be deployed at ``level``: prune (or factorise), recalibrate, fold batch norm, round.

    ``calibration`` = (images, labels) of the training split, needed by ``rebn``, ``w8a8`` and the ``grad`` families;
    ``domain``: of the images. Structured pruning removes the channels; ``w8a8`` adds quantisers of activations to the
    graph. Deterministic; CPU; ``params`` are not changed.
    Raises UserError for activations that are quantised already, for weights that are not finite or overflow in the
    level's format and for sums that overflow 32 bits under ``w8a8``; UnsupportedGraphError for a grouped convolution
    under structured pruning, ValueError where calibration images are missing.
    """
    params = {k: v.detach().to("cpu", torch.float32) for k, v in params.items()}
    for name, tensor in params.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"tensor {name!r} holds NaN or infinity; a network must have finite weights")
    if has_quantisers(graph):
        raise UserError("the network's activations are quantised already; expected the trained network, of level dense")
    if level.needs_calibration and calibration is None:
        raise ValueError(f"level {level} needs calibration images")
    graph, params = _pruned(graph, params, level, calibration)
    names = [f"{node.name}.weight" for node in graph.weighted()]
    factors = {} if level.kept is None else split(names, params, level.kept)
    params = without_factors(names, params)
    params |= {k: f.matrix.to(torch.float32).view_as(params[k]) for k, f in factors.items()}
    if level.rebn and calibration is not None:
        params = calibrate.recalibrate(graph, params, calibration[0])
    rows = _rows(graph, params, factors) if any(n.op == "batch_norm" for n in graph.nodes) else {}
    graph, params = fold_batch_norm(graph, params)
    if level.integer_inference and calibration is not None:
        graph, codes = integer_network(graph, params, calibration[0], domain)
        stored = {k: Stored("integer", v.codes, v.scale, 32 if k.endswith("bias") else 8) for k, v in codes.items()}
        return Compressed(level, graph, {k: stored.get(k) or Stored("float32", v + 0.0) for k, v in params.items()})
    # Adding 0 turns -0 into +0: the sparse encodings of a file have one zero only.
    found: dict[str, Weight] = {k: _store(k, v + 0.0, level, k in names) for k, v in params.items() if k not in factors}
    found |= {k: store(f, tuple(params[k].shape), level, rows.get(k)) for k, f in factors.items()}
    return Compressed(level, graph, {k: found[k] for k in params})


def _pruned(
    graph: Graph, params: Params, level: Level, calibration: tuple[Tensor, Tensor] | None
) -> tuple[Graph, Params]:  # fmt: skip
    if level.prune_family is None or level.sparsity is None:
        return graph, params
    grads = None
    if level.prune_family.endswith("grad") and calibration is not None:
        grads = calibrate.gradients(graph, params, *calibration)
    masks = prune.masks(graph, params, level.prune_family, level.sparsity, grads)
    params = prune.apply_masks(params, masks)
    return remove_channels(graph, params, masks) if level.structured else (graph, params)


def _rows(graph: Graph, params: Params, names: Iterable[str]) -> Params:
    """What folding multiplies every row of these weights by, float64 [out]."""
    _, ones = fold_batch_norm(graph, params | {k: torch.ones_like(params[k], dtype=torch.float64) for k in names})
    return {k: ones[k].flatten(1)[:, 0] for k in names}


def remove_channels(graph: Graph, params: Params, masks: Params) -> tuple[Graph, Params]:
    """The smaller network without the channels that structured ``masks`` zero; any dtype.

    Computes what the masked network computes up to the order of summation: rows of the producers, entries of batch
    norms and columns of the consumers (``H*W`` contiguous ones per channel after flatten) are cut out.
    """
    found = dict(params)
    for group in channel_groups(graph, params):
        keep = prune.kept_channels(masks, group)
        for name in group.producers:
            _cut(found, f"{name}.weight", 0, keep)
            _cut(found, f"{name}.bias", 0, keep)
        for name in group.affine:
            for suffix in ("weight", "bias", "running_mean", "running_var", "scale", "shift"):
                _cut(found, f"{name}.{suffix}", 0, keep)
        for name in group.consumers:
            _cut(found, f"{name}.weight", 1, keep)

    def resized(node: Node) -> Node:
        if not is_depthwise(node, params):
            return node
        return replace(node, attributes={**node.attributes, "groups": found[f"{node.name}.weight"].shape[0]})

    return Graph(tuple(resized(n) for n in graph.nodes), graph.input_shape), found


def _cut(params: Params, name: str, dim: int, keep: Tensor) -> None:
    if name in params:
        columns = keep.repeat_interleave(params[name].shape[dim] // keep.numel())
        params[name] = params[name].index_select(dim, columns.nonzero().flatten())


def _store(name: str, tensor: Tensor, level: Level, is_weight: bool) -> Stored:
    if level.quantise in ("fp16", "bf16"):
        kind = "float16" if level.quantise == "fp16" else "bfloat16"
        values = tensor.to(getattr(torch, kind))
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"level {level}: tensor {name!r} reaches {float(tensor.abs().max()):g}, beyond the largest {kind}"
                f" ({torch.finfo(values.dtype).max:g}); expected smaller weights or another level"
            )
        return Stored(kind, values)
    if level.bits is not None and is_weight:
        if level.affine:
            codes, scale, zero_point = quantize_affine(tensor, level.bits, per_tensor=level.per_tensor)
            return Stored("integer", codes, scale, level.bits, zero_point)
        if level.codebook:
            places, table = cluster(tensor, level.bits)
            return Stored("codebook", places, bits=level.bits, table=table.float())
        codes, scale = quantize(tensor, level.bits, per_tensor=level.per_tensor)
        return Stored("integer", codes, scale, level.bits)
    return Stored("float32", tensor)
