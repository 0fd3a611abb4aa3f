"""The architectures: one function and one entry in ``ARCHITECTURES`` each.

Every function is called with (config, input_shape, classes, normalization) and gives a module with named layers and
torch's own initialisation. ``normalization`` is a mean and a deviation per channel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from cactus_ray.config import ModelConfig
from cactus_ray.errors import UserError
from cactus_ray.models.normalize import Normalize

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
Shape = tuple[int, ...]
SMALL_SIDE = 16
"""Images with a side below this (the 8x8 digits) get the form of cnn_small that keeps more of their resolution."""
LARGEST_SMALL_STEM = 64
"""Images with sides up to this get resnet18's stem that keeps their resolution."""


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


def cnn5(config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> nn.Sequential:
    """Three convolutions 3x3 of 32, 64, 64 (strides 1, 2, 2) and 256 units after a fixed input normalisation."""
    layers = _Layers(_image("cnn5", input_shape), batch_norm=bool(config.batch_norm))
    layers.modules["normalize"] = Normalize.standard(*normalization)
    for width, stride in ((32, 1), (64, 2), (64, 2)):
        layers.conv(_scaled(width, config), kernel=3, stride=stride)
    return layers.linear(_scaled(256, config)).classify(classes)


def resnet18(config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> nn.Module:
    """Torchvision's ResNet-18 (He et al. 2016) of 64 to 512 channels after a fixed input normalisation.

    The stem is 3x3 for images up to 64 pixels, else 7x7 of stride 2 and max pooling. ``batch_norm: false`` puts a bias
    into every convolution instead.
    """
    return _ResNet18(config, _image("resnet18", input_shape), classes, normalization)


ARCHITECTURES: dict[str, Callable[[ModelConfig, Shape, int, Normalization], nn.Module]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn5": cnn5,
    "cnn7": cnn7,
    "resnet18": resnet18,
}


class _Block(nn.Module):
    """Two convolutions and a shortcut, a projection where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(before, channels, 3, stride, batch_norm=batch_norm)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _normed(channels, channels, 3, 1, batch_norm=batch_norm)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != channels:
            self.downsample = nn.Sequential(*_normed(before, channels, 1, stride, batch_norm=batch_norm))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        found: Tensor = self.relu2(y + self.downsample(x))
        return found


class _ResNet18(nn.Module):
    def __init__(self, config: ModelConfig, input_shape: Shape, classes: int, normalization: Normalization) -> None:
        super().__init__()
        batch_norm = config.batch_norm is not False
        small = max(input_shape[1:]) <= LARGEST_SMALL_STEM
        widths = [_scaled(width, config) for width in (64, 128, 256, 512)]
        self.normalize = Normalize.standard(*normalization)
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1, self.bn1 = _normed(input_shape[0], widths[0], kernel, stride, batch_norm=batch_norm)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        for i, (before, width) in enumerate(zip([widths[0], *widths[:3]], widths, strict=True), 1):
            blocks = (
                _Block(before, width, 1 if i == 1 else 2, batch_norm=batch_norm),
                _Block(width, width, 1, batch_norm=batch_norm),
            )
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(x)))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        found: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return found


def _normed(before: int, channels: int, kernel: int, stride: int, *, batch_norm: bool) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution that keeps the size (but for its stride), and what follows it."""
    conv = nn.Conv2d(before, channels, kernel, stride, padding=kernel // 2, bias=not batch_norm)
    return conv, nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


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
