"""A quickly trained network on the digits inside scikit-learn, and its images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.trace import trace

EPSILON = 0.1


@dataclass(frozen=True)
class Subject:
    """A trained network and 60 images that it was not trained on."""

    graph: Graph
    params: Params
    images: Tensor
    labels: Tensor


def train_subject() -> Subject:
    """Certified training for a few seconds: most samples are certified, some only by CROWN, some fall."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    graph, params = trace(module, (1, 8, 8))
    params = {k: torch.randn(v.shape, generator=generator) / max(1, v[0].numel()) ** 0.5 for k, v in params.items()}
    for tensor in params.values():
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(params.values(), lr=0.005)
    steps = 500
    for step in range(steps):
        chosen = order[torch.randint(1500, (64,), generator=generator)]
        x, y = images[chosen], labels[chosen]
        share = min(1.0, 2 * step / steps)
        lower = interval.margins(graph, params, interval.ball(x, share * EPSILON, (0.0, 1.0)), y)
        loss = (1 - share / 2) * F.cross_entropy(forward(graph, params, x), y) + share / 2 * F.cross_entropy(-lower, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held_out = order[1500:1560]
    return Subject(graph, {k: v.detach() for k, v in params.items()}, images[held_out], labels[held_out])
