import pytest
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Node
from cactus_ray.bounds.interval import Box
from cactus_ray.training.losses import RampRegularizer


def _seen(center: Tensor, radius: Tensor, input_radius: float) -> RampRegularizer:
    visitor = RampRegularizer()
    visitor(Node("input", "input"), Box(torch.zeros(1, 2), torch.full((1, 2), input_radius)))
    visitor(Node("fc", "linear", ("input",)), Box(center, radius))
    visitor(Node("relu", "relu", ("fc",)), Box(center, radius))
    return visitor


def test_regularizer_by_hand() -> None:
    # Radius grows from 0.1 to 0.4: ratio 0.25, shortfall (0.5 - 0.25) / 0.5 = 0.5. Active centre 1, inactive -4: ratio
    # of means 0.25 -> 0.5. Mean -1.5, deviations 6.25 each: ratio 1 -> 0.
    center, radius = torch.tensor([[1.0, -4.0]]), torch.full((1, 2), 0.4)
    assert _seen(center, radius, 0.1).value().item() == pytest.approx(1.0)


def test_the_input_is_the_normalised_one() -> None:
    center, radius = torch.tensor([[1.0, -4.0]]), torch.full((1, 2), 0.4)
    visitor = RampRegularizer()
    visitor(Node("input", "input"), Box(torch.zeros(1, 2), torch.full((1, 2), 0.025)))
    visitor(Node("normalize", "scale_shift", ("input",)), Box(torch.zeros(1, 2), torch.full((1, 2), 0.1)))
    visitor(Node("fc", "linear", ("normalize",)), Box(center, radius))
    visitor(Node("relu", "relu", ("fc",)), Box(center, radius))
    assert visitor.value().item() == pytest.approx(1.0)
    # a layer's output that is scaled is no input any more
    visitor(Node("scale", "scale_shift", ("relu",)), Box(center, 9 * radius))
    assert visitor.value().item() == pytest.approx(1.0)


def test_regularizer_without_stable_neurons_is_finite_with_finite_gradient() -> None:
    center = torch.tensor([[0.1, -0.1]], requires_grad=True)
    radius = torch.full((1, 2), 0.4, requires_grad=True)
    value = _seen(center, radius, 0.4).value()
    assert value.item() == 0.0
    gradients = torch.autograd.grad(value, (center, radius), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
