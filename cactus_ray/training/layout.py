"""A network laid out so that training passes over it are cheap: the same function, other memory and fewer operators."""

from __future__ import annotations

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, batch_norm_affine


def channels_last(params: Params) -> Params:
    """``params`` with the kernels of convolutions in channels-last memory on a CPU; differentiable.

    Every convolution then reads and writes that layout, in which its gradients cost half and less. Strides are given
    in full, because torch calls a kernel of one input channel channels-last in either layout, and then takes the slow.
    A network with kernels of one pixel keeps its layout: the gradients that oneDNN gives of a strided one in this
    memory are wrong for 3 and 4 input channels, and it writes where it must not (torch 2.14). GPUs keep theirs until
    somebody has measured both: in float32 either may be the faster.
    """
    if any(v.dim() == 4 and v.shape[2:] == (1, 1) for v in params.values()):
        return params
    return {k: _channels_last(v) if v.dim() == 4 and v.device.type == "cpu" else v for k, v in params.items()}


def _channels_last(kernel: Tensor) -> Tensor:
    inputs, height, width = kernel.shape[1:]
    strides = (inputs * height * width, 1, width * inputs, inputs)
    laid = torch.empty_strided(kernel.shape, strides, dtype=kernel.dtype, device=kernel.device)
    return laid.copy_(kernel)


def merged(graph: Graph, params: Params, statistics: Statistics | None) -> tuple[Graph, Params]:
    """The same function with every batch norm right behind a convolution merged into it; differentiable.

    ``statistics`` as in ``graph.forward``. A kernel is far smaller than what it makes, so scaling it is cheaper, above
    all in the backward pass. The merged node bears the batch norm's name: visitors see the same boxes under it.
    Unlike ``fold_batch_norm``, which serves what is deployed, gradients flow, and also into ``statistics``. A network
    that quantises activations stays as it is: another rounding in front of a code may give another code.
    """
    if any(node.op == "quantize" for node in graph.nodes):
        return graph, params
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    convolutions = {n.name: n for n in graph.nodes if n.op == "conv2d" and readers.get(n.name) == 1}
    norms = {n.inputs[0]: n for n in graph.nodes if n.op == "batch_norm" and n.inputs[0] in convolutions}
    nodes, tensors = [], dict(params)
    for node in graph.nodes:
        if node.name in norms:
            continue
        if node.op == "batch_norm" and node.inputs[0] in norms:
            before = convolutions[node.inputs[0]]
            scale, shift = batch_norm_affine(node, params, statistics)
            bias = params.get(f"{before.name}.bias")
            tensors[f"{node.name}.weight"] = params[f"{before.name}.weight"] * scale.view(-1, 1, 1, 1)
            tensors[f"{node.name}.bias"] = shift if bias is None else torch.addcmul(shift, bias, scale)
            node = Node(node.name, "conv2d", before.inputs, before.attributes)
        nodes.append(node)
    return Graph(tuple(nodes), graph.input_shape), tensors
