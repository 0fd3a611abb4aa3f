"""Linear nodes read backward: forms over a node's output as forms over its input (the adjoint, and a constant)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Node, Params, batch_norm_affine
from cactus_ray.bounds.rows import Rows, Shape
from cactus_ray.errors import UnsupportedGraphError

MATRIX_INPUTS, MATRIX_WASTE = 512, 8
"""A matrix reads a convolution backward where windows have at most so many coefficients, and it so many zeros."""


def pull_linear(node: Node, params: Params, rows: Rows, shape: Shape) -> tuple[Rows, Tensor | float]:
    """Forms over a linear node's input (of the given shape) that equal forms over its output, and their constants."""
    match node.op:
        case "conv2d":
            return _pull_conv(node, params, rows, shape)
        case "linear":
            weight, bias = params[f"{node.name}.weight"], params.get(f"{node.name}.bias")
            coefficients = rows.dense((*shape[:-1], weight.shape[0])).coefficients
            constant = 0.0 if bias is None else (coefficients @ bias).reshape(*coefficients.shape[:2], -1).sum(2)
            return Rows(coefficients @ weight), constant
        case "batch_norm" | "scale_shift":
            if node.op == "batch_norm":
                scale, shift = batch_norm_affine(node, params)
            else:
                scale, shift = params[f"{node.name}.scale"], params[f"{node.name}.shift"]
            channels = scale.view(1, 1, -1, *([1] * (rows.coefficients.dim() - 3)))
            return Rows(rows.coefficients * channels, rows.origin), _per_channel_sum(rows, shift)
        case "avg_pool2d":
            return Rows(_pull_avg_pool(node, rows, shape)), 0.0
        case "flatten":
            return Rows(rows.coefficients.view(*rows.coefficients.shape[:2], *shape)), 0.0
    raise UnsupportedGraphError(f"operator {node.op!r} of node {node.name!r} has no linear bounds")


def _per_channel_sum(rows: Rows, values: Tensor) -> Tensor:
    """``sum(coefficients * values)`` [B, S] for values [C] of dimension 2."""
    sums = rows.coefficients.flatten(3).sum(3) if rows.coefficients.dim() > 3 else rows.coefficients
    return sums @ values


def _pull_conv(node: Node, params: Params, rows: Rows, shape: Shape) -> tuple[Rows, Tensor | float]:
    weight, bias = params[f"{node.name}.weight"], params.get(f"{node.name}.bias")
    constant = 0.0 if bias is None else _per_channel_sum(rows, bias)
    stride, padding, dilation = node["stride"], node["padding"], node["dilation"]
    flat = rows.coefficients.flatten(0, 1)
    kernel = weight.shape[-2:]
    if rows.origin is not None:  # the window grows; the padding's share of it is cut off
        grown = _grow(node, weight, flat)
        scale, offset = torch.tensor([stride, padding], device=rows.origin.device)
        window = Rows(grown.view(*rows.coefficients.shape[:2], *grown.shape[1:]), rows.origin * scale - offset)
        return window.inside(shape), constant
    extra = [
        shape[1 + i] - ((flat.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in (0, 1)
    ]
    full = F.conv_transpose2d(flat, weight, None, stride, padding, extra, node["groups"], dilation)
    return Rows(full.view(*rows.coefficients.shape[:2], *shape)), constant


def _grow(node: Node, weight: Tensor, windows: Tensor) -> Tensor:
    """The transposed convolution of windows [R, C, h, w] without padding: larger windows.

    Small windows go through one matrix: a transposed convolution of very many very small maps is mostly overhead. The
    matrix holds the kernel's entries and zeros, so its sums round no worse.
    """
    stride, dilation = node["stride"], node["dilation"]
    (channels, height, width), (_, targets, *kernel) = windows.shape[1:], weight.shape
    span = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    size = [stride[0] * (height - 1) + span[0], stride[1] * (width - 1) + span[1]]
    wasteful = size[0] * size[1] > MATRIX_WASTE * kernel[0] * kernel[1]
    if node["groups"] > 1 or wasteful or channels * height * width > min(len(windows), MATRIX_INPUTS):
        return F.conv_transpose2d(windows, weight, None, stride, 0, 0, node["groups"], dilation)
    matrix = weight.new_zeros(channels, height, width, targets, *size)
    for y in range(height):
        rows = slice(stride[0] * y, stride[0] * y + span[0], dilation[0])
        for x in range(width):
            columns = slice(stride[1] * x, stride[1] * x + span[1], dilation[1])
            matrix[:, y, x, :, rows, columns] = weight
    return (windows.flatten(1) @ matrix.flatten(0, 2).flatten(1)).view(len(windows), targets, *size)


def _pull_avg_pool(node: Node, rows: Rows, shape: Shape) -> Tensor:
    kernel, stride, padding = node["kernel"], node["stride"], node["padding"]
    size = [(shape[1 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    coefficients = rows.dense((shape[0], *size)).coefficients
    if not node["count_include_pad"]:
        ones = coefficients.new_ones(1, 1, *shape[1:])
        coefficients = coefficients / F.avg_pool2d(ones, kernel, stride, padding, count_include_pad=True)
    weight = coefficients.new_full((1, 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
    extra = [shape[1 + i] - ((size[i] - 1) * stride[i] - 2 * padding[i] + kernel[i]) for i in (0, 1)]
    flat = coefficients.reshape(-1, 1, *size)
    full = F.conv_transpose2d(flat, weight, None, stride, padding, extra)
    return full.view(*coefficients.shape[:2], *shape)


def unbroadcast(rows: Rows, shape: Shape) -> Rows:
    """Forms over one term of a sum whose shape was broadcast."""
    if rows.origin is not None and shape[-2:] == (1, 1):
        return Rows(rows.coefficients.flatten(3).sum(3)[..., None, None])
    if rows.origin is not None or tuple(rows.coefficients.shape[2:]) == shape:
        return rows
    return Rows(rows.coefficients.sum_to_size(*rows.coefficients.shape[:2], *shape))
