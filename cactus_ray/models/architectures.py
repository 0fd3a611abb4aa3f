"""The architectures: one function and one entry in ``ARCHITECTURES`` each.

Every function is called with (config, input_shape, classes, normalization) and gives an ``nn.Sequential`` with named
layers and torch's own initialisation. ``normalization`` is a mean and a deviation per channel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from cactus_ray.config import ModelConfig
from cactus_ray.errors import UserError
from cactus_ray.models.normalize import Normalize

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
Shape = tuple[int, ...]
SMALL_SIDE = 16
"""Images with a side below this (the 8x8 digits) get the form of cnn_small that keeps more of their resolution."""


def mlp(config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> nn.Sequential:
    """Fully connected layers of ``config.hidden`` units."""
    layers = _Layers(input_shape, batch_norm=bool(config.batch_norm))
    for width in config.hidden:
        layers.linear(_scaled(width, config))
    return layers.classify(classes)


def cnn_small(config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> nn.Sequential:
    """Two convolutions (16, 32) and one hidden fully connected layer; 100 units, 64 on small images."""
    layers = _Layers(_image("cnn_small", input_shape), batch_norm=bool(config.batch_norm))
    if min(input_shape[1:]) < SMALL_SIDE:
        layers.conv(_scaled(16, config), kernel=3, stride=1)
        layers.conv(_scaled(32, config), kernel=3, stride=2)
        return layers.linear(_scaled(64, config)).classify(classes)
    layers.conv(_scaled(16, config), kernel=4, stride=2)
    layers.conv(_scaled(32, config), kernel=4, stride=2)
    return layers.linear(_scaled(100, config)).classify(classes)


def cnn7(config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> nn.Sequential:
    """The network of the certified-training literature (Shi et al. 2021): five convolutions, 512 units, batch norm.

    Convolutions 3x3 of 64, 64, 128 (stride 2), 128, 128 after a fixed input normalisation.
    """
    layers = _Layers(_image("cnn7", input_shape), batch_norm=config.batch_norm is not False)
    layers.modules["normalize"] = Normalize.standard(*normalization)
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers.conv(_scaled(width, config), kernel=3, stride=stride)
    return layers.linear(_scaled(512, config)).classify(classes)


ARCHITECTURES: dict[str, Callable[[ModelConfig, Shape, int, Normalization], nn.Sequential]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn7": cnn7,
}


class _Layers:
    """Grows a sequence of layers and keeps track of the shape between them."""

    def __init__(self, input_shape: Shape, *, batch_norm: bool) -> None:
        self.modules: OrderedDict[str, nn.Module] = OrderedDict()
        self.shape, self.batch_norm = input_shape, batch_norm
        self.hidden = self.convolutions = self.linears = 0

    def conv(self, channels: int, *, kernel: int, stride: int) -> _Layers:
        self.convolutions += 1
        before, *sides = self.shape
        # a batch norm right behind has its own shift, so the bias would be a tensor without effect
        layer = nn.Conv2d(before, channels, kernel, stride, padding=1, bias=not self.batch_norm)
        self.modules[f"conv{self.convolutions}"] = layer
        self.shape = (channels, *((side + 2 - kernel) // stride + 1 for side in sides))
        return self._activate(nn.BatchNorm2d(channels) if self.batch_norm else None)

    def linear(self, features: int) -> _Layers:
        self._linear(features, bias=not self.batch_norm)
        return self._activate(nn.BatchNorm1d(features) if self.batch_norm else None)

    def classify(self, classes: int) -> nn.Sequential:
        self._linear(classes, bias=True)
        return nn.Sequential(self.modules)

    def _linear(self, features: int, *, bias: bool) -> None:
        if "flatten" not in self.modules:
            self.modules["flatten"] = nn.Flatten()
            size = 1
            for side in self.shape:
                size *= side
            self.shape = (size,)
        self.linears += 1
        self.modules[f"fc{self.linears}"] = nn.Linear(self.shape[0], features, bias=bias)
        self.shape = (features,)

    def _activate(self, batch_norm: nn.Module | None) -> _Layers:
        self.hidden += 1
        if batch_norm is not None:
            self.modules[f"bn{self.hidden}"] = batch_norm
        self.modules[f"relu{self.hidden}"] = nn.ReLU()
        return self


def _scaled(width: int, config: ModelConfig) -> int:
    return max(1, round(width * config.width))


def _image(name: str, input_shape: Shape) -> Shape:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UserError(
            f"model.name: {name} on inputs of shape {list(input_shape)}; expected [channels, height, width]"
        )
    return input_shape
