"""A user's own network with a residual addition, for ``model.factory``."""

from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around a shortcut, pooled and classified."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(x + self.second(x))
        return self.head(self.pool(x).flatten(1))


def residual(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Residual(input_shape[0], classes)
