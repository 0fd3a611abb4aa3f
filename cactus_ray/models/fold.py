"""Batch norm folded into the layer before it: the network that is compressed, verified and deployed."""

from __future__ import annotations

from dataclasses import replace

from cactus_ray.bounds.graph import Graph, Node, Params, batch_norm_affine


def fold_batch_norm(graph: Graph, params: Params) -> tuple[Graph, Params]:
    """The same function in evaluation mode without batch-norm nodes.

    A batch norm that is the only reader of a conv2d or linear node is merged into it (the layer gets a bias, and its
    place is the batch norm's); any other becomes a scale_shift node of the same name. Computed in float64 from the
    running statistics and rounded once to the dtype of the tensors. Tensors of other nodes are shared, not copied.
    """
    nodes, tensors = list(graph.nodes), dict(params)
    for norm in [n for n in nodes if n.op == "batch_norm"]:
        norm = next(n for n in nodes if n.name == norm.name)  # its input may have been renamed by an earlier merge
        producer = next(n for n in nodes if n.name == norm.inputs[0])
        readers = [n for n in nodes if producer.name in n.inputs]
        position = nodes.index(norm)
        if producer.op in ("conv2d", "linear") and len(readers) == 1:
            _merge(producer, norm, tensors)
            nodes[position] = producer
            nodes.pop(nodes.index(producer))  # its old place, which comes first
            nodes = [_rewire(n, norm.name, producer.name) for n in nodes]
        else:
            _as_scale_shift(norm, tensors)
            nodes[position] = Node(norm.name, "scale_shift", norm.inputs)
    return Graph(tuple(nodes), graph.input_shape), tensors


def _merge(layer: Node, norm: Node, tensors: Params) -> None:
    """``scale * (W x + b) + shift = (scale W) x + (scale b + shift)``, channel by channel, in place."""
    weight, bias = tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias")
    scale, shift = batch_norm_affine(norm, _pop_wide(norm, tensors))
    rows = scale.view(-1, *([1] * (weight.dim() - 1)))
    tensors[f"{layer.name}.weight"] = (weight.double() * rows).to(weight.dtype)
    tensors[f"{layer.name}.bias"] = (shift if bias is None else bias.double() * scale + shift).to(weight.dtype)


def _as_scale_shift(norm: Node, tensors: Params) -> None:
    dtype = tensors[f"{norm.name}.running_mean"].dtype
    scale, shift = batch_norm_affine(norm, _pop_wide(norm, tensors))
    tensors[f"{norm.name}.scale"], tensors[f"{norm.name}.shift"] = scale.to(dtype), shift.to(dtype)


def _pop_wide(norm: Node, tensors: Params) -> Params:
    """The batch norm's tensors in float64, taken out of ``tensors``."""
    keys = [f"{norm.name}.{k}" for k in ("weight", "bias", "running_mean", "running_var")]
    return {k: tensors.pop(k).double() for k in keys if k in tensors}


def _rewire(node: Node, old: str, new: str) -> Node:
    if old not in node.inputs:
        return node
    return replace(node, inputs=tuple(new if i == old else i for i in node.inputs))
