"""The average of the weights along the way, which is often more accurate than the last of them.

``ema``: every step, an exponential moving average (Polyak and Juditsky 1992). ``swa``: every epoch, the plain mean
(Izmailov et al. 2018). Both start at ``train.average_from``; batch-norm statistics are not averaged but measured anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, trainable
from cactus_ray.compression.calibration import recalibrate


@torch.no_grad()
def include(average: Params, count: int, params: Params, decay: float | None) -> int:
    """One more network into ``average`` (in place; empty at first) of ``count`` networks. Returns the new count.

    ``decay``: share that the average keeps; the first 1 / (1 - decay) networks count the same, so that the start has no
    weight of its own. None: all networks count the same.
    """
    new = trainable(params)
    if not average:
        average.update({name: tensor.detach().clone() for name, tensor in new.items()})
        return 1
    share = 1.0 / (count + 1)
    if decay is not None:
        share = max(share, 1.0 - decay)
    torch._foreach_lerp_([average[name] for name in new], [tensor.detach() for tensor in new.values()], share)
    return count + 1


def remeasured(graph: Graph, params: Params, images: Tensor) -> Params:
    """A network of averaged weights with its own batch-norm statistics, measured on ``images`` (``rebn``'s)."""
    if all(node.op != "batch_norm" for node in graph.nodes):
        return params
    return recalibrate(graph, params, images)
