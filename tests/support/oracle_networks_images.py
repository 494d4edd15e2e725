"""Networks of the oracle on small images and signals, by name: makers for a number of outputs, and their inputs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tests.support.oracle_layers import Residual, with_statistics

__all__ = ["IMAGE_NETWORKS"]

Maker = Callable[[int], nn.Module]


def _of_images(*layers: Callable[[], nn.Module], features: int) -> Maker:
    """Layers on images (N, 1, 6, 6), with a linear classifier at their end."""

    def build(outputs: int) -> nn.Module:
        model = nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.Linear(features, outputs))
        return with_statistics(model, torch.randn(16, 1, 6, 6))

    return build


def _of_signals(*layers: Callable[[], nn.Module], features: int) -> Maker:
    """Layers on signals (N, 2, 7), with a linear classifier at their end."""

    def build(outputs: int) -> nn.Module:
        model = nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.Linear(features, outputs))
        return with_statistics(model, torch.randn(16, 2, 7))

    return build


class _Excited(nn.Module):
    """Channels weighted by what all of them hold (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(1, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        weights = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * weights[:, :, None, None]


class _Twice(nn.Module):
    """One convolution before two batch norms: neither can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.tanh(self.left(x)) + torch.sigmoid(self.right(x))


class _Written(nn.Module):
    """Activations that overwrite their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x += 0.1
        return nn.functional.relu_(x)


_conv, _pool = nn.Conv2d, nn.AdaptiveAvgPool2d

IMAGE_NETWORKS: Mapping[str, tuple[Maker, str]] = {
    "convolution and batch norm": (
        _of_images(lambda: _conv(1, 4, 3), lambda: nn.BatchNorm2d(4), nn.Tanh, lambda: _pool(2), features=16),
        "images",
    ),
    "two convolutions and batch norms": (
        _of_images(
            lambda: _conv(1, 3, 3, padding=1, bias=False),
            lambda: nn.BatchNorm2d(3),
            nn.ReLU,
            lambda: _conv(3, 4, 3, stride=2),
            lambda: nn.BatchNorm2d(4),
            nn.SiLU,
            features=16,
        ),
        "images",
    ),
    "residual convolutions": (
        _of_images(
            lambda: _conv(1, 3, 3),
            lambda: Residual(_conv(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
            lambda: _pool(2),
            features=12,
        ),
        "images",
    ),
    "max pooling": (
        _of_images(lambda: _conv(1, 4, 3), nn.GELU, lambda: nn.MaxPool2d(2), lambda: _conv(4, 4, 2), features=4),
        "images",
    ),
    "group norm": (
        _of_images(lambda: _conv(1, 4, 3), lambda: nn.GroupNorm(2, 4), nn.SiLU, lambda: _pool(2), features=16),
        "images",
    ),
    "instance norm": (
        _of_images(
            lambda: _conv(1, 4, 3), lambda: nn.InstanceNorm2d(4, affine=True), nn.Tanh, lambda: _pool(2), features=16
        ),
        "images",
    ),
    "depthwise and circular": (
        _of_images(
            lambda: _conv(1, 4, 3, padding=1, padding_mode="circular"),
            nn.Softplus,
            lambda: _conv(4, 4, 3, groups=4),
            nn.Tanh,
            lambda: _pool(2),
            features=16,
        ),
        "images",
    ),
    "transposed convolution": (
        _of_images(
            lambda: _conv(1, 3, 3, stride=2),
            nn.Tanh,
            lambda: nn.ConvTranspose2d(3, 2, 2, stride=2),
            nn.Tanh,
            features=32,
        ),
        "images",
    ),
    "squeeze and excitation": (_of_images(_Excited, lambda: _pool(2), features=16), "images"),
    "one convolution, two norms": (_of_images(_Twice, lambda: _pool(2), features=16), "images"),
    "overwritten activations": (_of_images(_Written, lambda: _pool(2), features=16), "images"),
    "signals with batch norm": (
        _of_signals(
            lambda: nn.Conv1d(2, 5, 3), lambda: nn.BatchNorm1d(5), nn.GELU, lambda: nn.AdaptiveAvgPool1d(2), features=10
        ),
        "signals",
    ),
    "dilated signals": (
        _of_signals(lambda: nn.Conv1d(2, 6, 2, dilation=2), nn.Tanh, lambda: nn.Conv1d(6, 4, 2), nn.SiLU, features=16),
        "signals",
    ),
}
