"""Backbones for small images: modules from images to features, with the attribute ``num_features``.

Shapes: B batch, C channels, H and W pixels, F features. The CIFAR networks follow He et al. 2016, arXiv 1512.03385.
"""

from collections.abc import Callable

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one
from moe_heads.lightning_modules.fast_cnn import FastCNN
from moe_heads.lightning_modules.feature_extractors import TimmBackbone, TorchvisionBackbone

__all__ = ["CifarResNet", "DigitsCNN", "ResNet18Cifar", "build_backbone"]


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _he_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class DigitsCNN(nn.Module):
    """Four 3x3 convolutions with batch norm, then the mean over each quarter: (B, C, H, W) → (B, 4·width).

    The network is made for the 8x8 digits. It is small enough (18,768 parameters) that a run takes seconds and its
    Hessian can be analyzed on two cores. The quarters of the image are pooled separately because the positions of the
    strokes distinguish the digits.

    Args:
        in_channels: C. The digits are gray.
        width: Channels of the first and the last convolution. The two in between have twice as many.

    Attributes:
        num_features: F = 4·width.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> DigitsCNN()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        check_at_least_one(in_channels=in_channels, width=width)
        self.num_features = 4 * width
        self.layers = nn.Sequential(
            *_conv_bn_relu(in_channels, width),
            *_conv_bn_relu(width, 2 * width),
            *_conv_bn_relu(2 * width, 2 * width, stride=2),
            *_conv_bn_relu(2 * width, width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.apply(_he_init)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, C, H, W)."""
        features: Tensor = self.layers(x)
        return features


class _BasicBlock(nn.Module):
    """Two convolutions with an identity shortcut, strided and zero-padded where the shape changes (option A of He)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_new_channels = out_channels - in_channels
        self.residual = nn.Sequential(
            *_conv_bn_relu(in_channels, out_channels, stride), *_conv_bn_relu(out_channels, out_channels)[:-1]
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.num_new_channels // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.num_new_channels - before))
        return F.relu(shortcut + self.residual(x))


class CifarResNet(nn.Module):
    """Residual network of He et al. (2016, section 4.2) for CIFAR: (B, C, H, W) → (B, 4·width).

    It has a 3x3 stem, three stages of n = (depth - 2)/6 blocks with width, 2·width and 4·width channels at full, half
    and quarter resolution, and the mean over the pixels. Shortcuts have no parameters. Depth 20 has 269,072
    parameters.

    Args:
        depth: Number of layers with weights: 8, 14, 20, 32, 44, 56, 110 … It counts the classifier, which is omitted
            here.
        width: Channels of the first stage, 16 in the paper.
        in_channels: C.

    Attributes:
        num_features: F = 4·width.

    Raises:
        ValueError: If the depth is not 6n + 2 with n of at least 1, or a size is below 1.

    Example:
        >>> import torch
        >>> CifarResNet(depth=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """

    def __init__(self, depth: int = 20, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        check_at_least_one(depth=depth, width=width, in_channels=in_channels)
        num_blocks, rest = divmod(depth - 2, 6)
        if num_blocks < 1 or rest:
            raise ValueError(f"depth: expected 6n + 2 with n of at least 1 (8, 14, 20, 32, 44 …), got {depth}.")
        self.num_features = 4 * width
        layers = _conv_bn_relu(in_channels, width)
        channels = width
        for stage_channels, stage_stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for block in range(num_blocks):
                layers.append(_BasicBlock(channels, stage_channels, stage_stride if block == 0 else 1))
                channels = stage_channels
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.apply(_he_init)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, C, H, W)."""
        features: Tensor = self.layers(x)
        return features


class ResNet18Cifar(nn.Module):
    """ResNet-18 of torchvision for 32x32 images, the backbone of arXiv 2601.15021: (B, C, H, W) → (B, 512).

    A 3x3 stem with stride 1 replaces the 7x7 stem with stride 2, and the max-pool is removed, so that the first stage
    has full resolution. ``fc`` is removed. The network has 11,168,832 parameters and takes 555 million multiply-adds
    for a 32x32 image.

    Args:
        in_channels: C.

    Attributes:
        num_features: F = 512.

    Raises:
        ValueError: If ``in_channels`` is below 1.

    Example:
        >>> import torch
        >>> ResNet18Cifar().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 512])
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        check_at_least_one(in_channels=in_channels)
        self.resnet = torchvision.models.resnet18(weights=None)
        self.num_features: int = self.resnet.fc.in_features
        self.resnet.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        _he_init(self.resnet.conv1)
        self.resnet.maxpool = nn.Identity()
        self.resnet.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, 512) of images (B, C, H, W)."""
        features: Tensor = self.resnet(x)
        return features


_BY_NAME: dict[str, Callable[[int], nn.Module]] = {
    "digits_cnn": lambda in_channels: DigitsCNN(in_channels),
    "fast_cnn": lambda in_channels: FastCNN(in_channels=in_channels),
    "resnet8": lambda in_channels: CifarResNet(8, in_channels=in_channels),
    "resnet20": lambda in_channels: CifarResNet(20, in_channels=in_channels),
    "resnet18": lambda in_channels: ResNet18Cifar(in_channels),
}


def build_backbone(name: str, in_channels: int, image_size: int) -> nn.Module:
    """Build the untrained backbone of a given name for square images. Its ``num_features`` is the input size of a head.

    Args:
        name: "digits_cnn", "fast_cnn" (for a CPU), "resnet8", "resnet20", "resnet18" (of arXiv 2601.15021), or any
            model of two libraries as "torchvision:<name>" or "timm:<name>".
        in_channels: Channels of the images.
        image_size: Side of the images in pixels. The names without a colon accept any size, but fast_cnn needs at
            least 9 pixels.

    Returns:
        A module from (B, in_channels, image_size, image_size) to (B, num_features).

    Raises:
        ValueError: If there is no backbone of that name, or it does not support such images.
        ImportError: If a timm model is requested and timm is not installed.

    Example:
        >>> build_backbone("resnet8", in_channels=3, image_size=32).num_features
        64
    """
    check_at_least_one(in_channels=in_channels, image_size=image_size)
    if name == "fast_cnn" and image_size < FastCNN.least_size():
        raise ValueError(f"image_size: expected at least {FastCNN.least_size()} for fast_cnn, got {image_size}.")
    if name in _BY_NAME:
        return _BY_NAME[name](in_channels)
    library, _, model_name = name.partition(":")
    if library == "torchvision" and model_name:
        return TorchvisionBackbone(model_name, in_channels, image_size)
    if library == "timm" and model_name:
        return TimmBackbone(model_name, in_channels, image_size)
    choices = [*_BY_NAME, "torchvision:<name>", "timm:<name>"]
    raise ValueError(f"backbone: expected one of {', '.join(choices)}, got {name!r}.")
