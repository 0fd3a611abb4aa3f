"""Networks as people bring them, for ``model.factory`` on digits; what becomes of each is in test_own_networks.py."""

import copy
import itertools
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cactus_ray.config import ModelConfig
from cactus_ray.models import build

Shape = tuple[int, ...]
_calls = itertools.count(1)


def _small(first: nn.Module | None = None, *rest: nn.Module, features: int = 4 * 36) -> nn.Sequential:
    return nn.Sequential(first or nn.Conv2d(1, 4, 3), *rest, nn.ReLU(), nn.Flatten(), nn.Linear(features, 10))


# --- weights and what is said about them ---------------------------------------------------------------------------


def plain(shape: Shape, classes: int) -> nn.Module:
    return _small()


def pretrained(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    nn.init.constant_(net[0].weight, 0.123)
    return net


def loaded(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    state = {name: torch.linspace(-0.3, 0.3, p.numel()).view_as(p) for name, p in net.named_parameters()}
    net.load_state_dict(state)
    return net


def drawn_otherwise(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    net[0].weight.data.normal_(0, 0.2)
    return net


def drawn_by_numpy(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    values = [random.random(), *np.random.randn(35)]
    net[0].weight = nn.Parameter(torch.tensor(values, dtype=torch.float32).view(4, 1, 3, 3))
    return net


def drawn_with_a_seed(shape: Shape, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return _small()


def copied(shape: Shape, classes: int) -> nn.Module:
    return _small(copy.deepcopy(nn.Conv2d(1, 4, 3)))


def around_ours(shape: Shape, classes: int) -> nn.Module:
    """A head behind a network of the package, which the factory has built."""
    return nn.Sequential(build(ModelConfig(name="mlp"), shape, 16, generator=torch.Generator()), nn.Linear(16, classes))


def frozen(shape: Shape, classes: int) -> nn.Module:
    net = pretrained(shape, classes)
    net[0].weight.requires_grad_(False)
    return net


def frozen_stem(shape: Shape, classes: int) -> nn.Module:
    net = _small(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), features=64)
    net[:2].requires_grad_(False)
    return net


def all_frozen(shape: Shape, classes: int) -> nn.Module:
    return _small().requires_grad_(False)


def other_weights_each_time(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    nn.init.constant_(net[0].weight, 1 / next(_calls))
    return net


def other_layers_each_time(shape: Shape, classes: int) -> nn.Module:
    width = 8 + next(_calls)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def other_layers_by_seed(shape: Shape, classes: int) -> nn.Module:
    width = random.randint(8, 10_000)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def not_a_number(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    nn.init.constant_(net[0].weight, float("nan"))
    return net


# --- computed and shared weights -----------------------------------------------------------------------------------


def weight_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(parametrizations.weight_norm(nn.Conv2d(1, 4, 3)))


def spectral_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)))


def orthogonal(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    parametrizations.orthogonal(net[3])
    return net


def old_weight_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.utils.weight_norm(nn.Conv2d(1, 4, 3)))


def old_spectral_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.utils.spectral_norm(nn.Conv2d(1, 4, 3)))


def pruned(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


def pruned_twice(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    for _ in range(2):
        prune.ln_structured(net[0], "weight", amount=1, n=2, dim=0)
    return net


def pruned_bias(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    prune.random_unstructured(net[3], "bias", amount=0.5)
    return net


def pruned_for_good(shape: Shape, classes: int) -> nn.Module:
    net = pruned(shape, classes)
    prune.remove(net[0], "weight")
    return net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def tied(shape: Shape, classes: int) -> nn.Module:
    return Tied()


class Alias(nn.Module):
    """One layer under two names, which is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.net = nn.Sequential(nn.Flatten(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def alias(shape: Shape, classes: int) -> nn.Module:
    return Alias()


# --- what only a module's own call or training would do ------------------------------------------------------------


def hooked(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    net[0].register_forward_hook(lambda module, given, found: 2 * found)
    return net


def gradient_hook(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    net[0].weight.register_hook(lambda gradient: 0 * gradient)
    return net


def dropout(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.Dropout(0.3))


class InTraining(nn.Module):
    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch, self.fc = branch, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.branch == "dropout":
            return self.fc(F.dropout(x, training=self.training))
        return self.fc(x + x) if self.training else self.fc(x)


def dropout_in_forward(shape: Shape, classes: int) -> nn.Module:
    return InTraining("dropout").eval()


def another_forward_in_training(shape: Shape, classes: int) -> nn.Module:
    return InTraining("sum").eval()


def one_norm_in_evaluation(shape: Shape, classes: int) -> nn.Module:
    net = _small(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    net[1].eval()
    return net


def all_in_evaluation(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def by_value(shape: Shape, classes: int) -> nn.Module:
    return ByValue()


# --- kinds of modules and of numbers -------------------------------------------------------------------------------


def compiled(shape: Shape, classes: int) -> nn.Module:
    net: nn.Module = torch.compile(_small())
    return net


def compiled_in_place(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    net.compile()
    return net


def data_parallel(shape: Shape, classes: int) -> nn.Module:
    return nn.DataParallel(_small())


def scripted(shape: Shape, classes: int) -> nn.Module:
    return torch.jit.script(_small())


def lazy(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


def on_meta(shape: Shape, classes: int) -> nn.Module:
    with torch.device("meta"):
        return _small()


def double(shape: Shape, classes: int) -> nn.Module:
    return _small().double()


def complex_head(shape: Shape, classes: int) -> nn.Module:
    net = _small()
    net[3] = nn.Linear(144, 10, dtype=torch.complex64)
    return net


def channels_last(shape: Shape, classes: int) -> nn.Module:
    return _small().to(memory_format=torch.channels_last)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.auxiliary = nn.Linear(64, 10), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 64))


def unused(shape: Shape, classes: int) -> nn.Module:
    return Unused()


def double_by_default(shape: Shape, classes: int) -> nn.Module:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return _small()


def the_class(shape: Shape, classes: int) -> type:
    return nn.Linear


def eleven_classes(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))


# --- layers --------------------------------------------------------------------------------------------------------


def group_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))


def layer_norm(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 6, 6]))


def gelu(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.GELU())


def silu(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.Conv2d(1, 4, 3), nn.SiLU())


def relu6(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 10))


def uneven_padding(shape: Shape, classes: int) -> nn.Module:
    return _small(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 4, 3, stride=2), features=64)


class Normalised(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(0.1307))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / 0.3081)


def normalised(shape: Shape, classes: int) -> nn.Module:
    return Normalised(_small())


class ByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)) + 0.5
        return self.fc(x.view(x.size(0), -1))


def by_shape(shape: Shape, classes: int) -> nn.Module:
    return ByShape()
