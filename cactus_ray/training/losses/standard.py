"""Cross-entropy on clean images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, Statistics, forward


def standard(graph: Graph, params: Params, images: Tensor, labels: Tensor, statistics: Statistics) -> Tensor:
    """Cross-entropy on clean images. Batch norm uses the batch's statistics, which are stored in ``statistics``."""
    return F.cross_entropy(forward(graph, params, images, collect=statistics, in_place=True), labels)
