"""Small backbone for 32x32 images that trains in minutes on two CPU cores.

Shapes: B batch, C channels, H and W pixels, F features.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.checks import check_at_least_one

__all__ = ["FastCNN"]

_PATCH = 2  # side of the patches that the first layer whitens
_NUM_DIRECTIONS = 8  # of the 12 of a color patch; with both signs they make 16 channels
_WHITENING_EPS = 5e-4  # added to the variances: directions with a smaller variance are noise of the camera or of JPEG


class FastCNN(nn.Module):
    """Whitening layer and three stages of two 3x3 convolutions, each halving the resolution: (B, C, H, W) → (B, F).

    The design follows the fast CIFAR-10 networks (Jordan, arXiv 2404.00498, and Page, "How to train your ResNet",
    2019). It has few layers, with nearly all of the arithmetic in wide convolutions, for channels_last and bf16. The
    channels are multiples of 16, the vector size of a CPU. Convolutions are initialized to the identity on the channels
    that they share with their input. Batch norm has a short memory, since a training has few steps. The last layer is
    the maximum over the pixels.

    `whiten` fixes the first layer before training. It maps the 8 directions of largest variance of 2x2 patches to
    uncorrelated numbers of variance one, with both signs. A fixed layer needs no backward pass. Without `whiten` the
    layer is trained like the others.

    The identity initialization gains 0.7 and 2.0 points of accuracy in three epochs of CIFAR-10 with two seeds. The
    gains of the other choices are too small to measure this way ("What each choice is worth" in docs/results.md).

    Args:
        widths: Channels of the three stages. The default has 0.49 million parameters and takes 0.18 GFLOP for the
            forward and backward pass of a 32x32 image.
        in_channels: C.

    Attributes:
        num_features: F, the last of ``widths``.

    Raises:
        ValueError: If a size is below 1, or there are no widths.

    Example:
        >>> import torch
        >>> FastCNN()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(self, widths: Sequence[int] = (32, 128, 128), in_channels: int = 3) -> None:
        super().__init__()
        if not isinstance(widths, Sequence) or not widths:
            raise ValueError(f"widths: expected a sequence with the channels of each stage, got {widths!r}.")
        sizes: dict[str, Any] = {f"widths[{place}]": width for place, width in enumerate(widths)}
        check_at_least_one(in_channels=in_channels, **sizes)
        self.num_features = widths[-1]
        num_filters = 2 * min(_NUM_DIRECTIONS, in_channels * _PATCH**2)
        self.first = nn.Conv2d(in_channels, num_filters, _PATCH)
        # in the state dict, so that a fixed layer stays fixed after loading
        self.is_whitened: Tensor
        self.register_buffer("is_whitened", torch.tensor(False))
        self.register_load_state_dict_post_hook(_fix_where_whitened)  # type: ignore[no-untyped-call]
        stages = [layer for before, width in pairwise((num_filters, *widths)) for layer in _stage(before, width)]
        self.layers = nn.Sequential(nn.ReLU(), *stages, nn.AdaptiveMaxPool2d(1), nn.Flatten())

    @staticmethod
    def least_size(num_stages: int = 3) -> int:
        """Return the smallest side of an image in pixels for which every stage can halve the resolution."""
        return int(2**num_stages) + _PATCH - 1

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, C, H, W)."""
        features: Tensor = self.layers(self.first(x))
        return features

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Fix the first layer to the whitening of 2x2 patches of these images.

        With the largest eigenvalues λ and eigenvectors v of the second moments of the patches, E[p pᵀ] = Σ λ v vᵀ, the
        filters are ±v / √(λ + 5e-4), without a bias. The layer has no gradient from then on, also after its state dict
        is loaded.

        Args:
            images: Training images (N, C, H, W), normalized like the inputs of the network. A few thousand are enough.

        Raises:
            ValueError: If they have a different number of channels, are smaller than a patch, or are not finite.
        """
        channels = self.first.in_channels
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < _PATCH or not len(images):
            raise ValueError(f"images: expected (N, {channels}, H, W), got shape {tuple(images.shape)}.")
        if not images.is_floating_point() or not bool(images.isfinite().all()):
            got = "nan or infinity" if images.is_floating_point() else images.dtype
            raise ValueError(
                f"images: expected finite floats, got {got}. Normalize them like the inputs of the network."
            )
        patches = images.unfold(2, _PATCH, 1).unfold(3, _PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        moments = torch.zeros(patches.shape[1], patches.shape[1], dtype=torch.float64, device=images.device)
        for some in patches.split(1_000_000):
            moments += (some.T.double() @ some.double()) / len(patches)
        variances, directions = torch.linalg.eigh(moments)
        filters = (directions / (variances + _WHITENING_EPS).sqrt()).T.flip(0)[: self.first.out_channels // 2]
        self.first.weight.copy_(torch.cat([filters, -filters]).view_as(self.first.weight))
        nn.init.zeros_(self.first.bias)  # type: ignore[arg-type]
        self.is_whitened.fill_(True)
        _fix_where_whitened(self)


def _fix_where_whitened(backbone: FastCNN, *_: Any) -> None:
    if bool(backbone.is_whitened):
        backbone.first.requires_grad_(False)


def _stage(before: int, width: int) -> list[nn.Module]:
    """Build a stage. It halves the resolution early, so that the second convolution costs a quarter."""
    return [
        _convolution(before, width),
        nn.MaxPool2d(2),
        *_norm_and_activation(width),
        _convolution(width, width),
        *_norm_and_activation(width),
    ]


def _norm_and_activation(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, momentum=0.4), nn.ReLU()]


def _convolution(before: int, width: int) -> nn.Conv2d:
    convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
    # partial identity: output channel i copies input channel i, the additional channels are random
    nn.init.dirac_(convolution.weight.data[:before])
    return convolution
