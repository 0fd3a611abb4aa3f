"""What a runtime may answer at single points: comparing it with our reading of a file needs no tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.rounding import Rounding


def possible_answers(graph: Graph, params: Params, points: Tensor, arithmetic: str = "float32") -> Box:
    """The outputs [N, K], float64, that inference in ``arithmetic`` can give for points [N, *graph.input_shape].

    Beside a quantiser's tie rounding decides between two codes, a whole step apart; both are inside.
    """
    wide = {name: tensor.double() for name, tensor in params.items()}
    charged = Rounding.of(graph, wide, arithmetic)
    box = Box(points.double(), torch.zeros_like(points, dtype=torch.float64))
    with torch.no_grad():
        return charged.seal(interval.propagate(graph, wide, box, rounding=charged))
