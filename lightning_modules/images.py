"""Labeled images served as whole batches: from memory or from files, with tensor transforms for a batch at once.

Shapes: N images, B batch, C channels, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from moe_heads.checks import check_option

__all__ = ["CropBorder", "ImageFiles", "ImageTransform", "LabeledImages", "check_size"]

CropBorder = Literal["black", "reflect"]
"""What a random crop sees beyond the image."""


@dataclass(frozen=True)
class ImageTransform:
    """Raw images to normalized floats, (x / max_value - mean) / std, with random crops and flips if asked for.

    Each image of the batch draws its own crop and flip from torch's global generator.

    Attributes:
        mean: Mean of each channel on the scale 0 … 1.
        std: Standard deviation of each channel on the scale 0 … 1.
        padding: Pixels added on every side before a crop of the old size at a random place; 0 for no crop.
        flip: Mirror an image left to right with probability 1/2.
        max_value: Raw value that means 1.
        border: What is added: "black", or the image's own pixels mirrored at its edge ("reflect").

    Raises:
        ValueError: If ``border`` is neither.

    Example:
        >>> transform = ImageTransform(mean=(0.5,), std=(0.25,))
        >>> transform(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8))
        tensor([[[[2., 2.]]]])
    """

    mean: Sequence[float]
    std: Sequence[float]
    padding: int = 0
    flip: bool = False
    max_value: float = 255.0
    border: CropBorder = "black"

    def __post_init__(self) -> None:
        check_option("border", self.border, get_args(CropBorder))

    def __call__(self, images: Tensor) -> Tensor:
        """Floats (B, C, H, W) of raw images (B, C, H, W), uint8."""
        if self.padding:
            images = _random_crop(images, self.padding, self.border)
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images / self.max_value - mean) / std


def _random_crop(images: Tensor, padding: int, border: CropBorder) -> Tensor:
    num_images, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)) if border == "black" else _mirrored(images, padding)
    # every window of the old size, as a view: (B, C, 2·padding + 1, 2·padding + 1, H, W)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, num_images))
    return windows[torch.arange(num_images), :, top, left]


def _mirrored(images: Tensor, padding: int) -> Tensor:
    """Reflected borders by indices, since torch's own padding does not take integers."""
    if padding >= min(images.shape[2:]):
        raise ValueError(f"padding: expected less than the image's side for border='reflect', got {padding}")
    rows, columns = (torch.arange(-padding, size + padding).abs() for size in images.shape[2:])
    height, width = images.shape[2:]
    rows, columns = torch.minimum(rows, 2 * (height - 1) - rows), torch.minimum(columns, 2 * (width - 1) - columns)
    return images[:, :, rows[:, None], columns]


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded when they are indexed, as RGB.

    Attributes:
        paths: The files.
        height: H.
        width: W.
        resize: Scale an image until it covers H x W and cut out the middle; without it any other size is an error.
    """

    paths: Sequence[Path]
    height: int
    width: int
    resize: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Raw images (B, 3, H, W), uint8, of the indices (B,).

        Raises:
            ValueError: If a file is not an image or has another size.
        """
        images = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)
        for position, index in enumerate(indices.tolist()):
            images[position] = np.asarray(self._decode(self.paths[index]))
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def select(self, indices: Tensor) -> "ImageFiles":
        """The files of the indices (B,)."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()])

    def _decode(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: not a readable image: {error}") from error
        if self.resize:
            image = ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)
        check_size(path, image.size, (self.width, self.height))
        return image


def check_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Refuse an image whose (width, height) is not the expected one."""
    if size != expected:
        came, wanted = ("x".join(map(str, pixels)) for pixels in (size, expected))
        raise ValueError(f"{path}: {came} pixels, expected {wanted} as in the first image; give image_size to resize")


class LabeledImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a transformed image (C, H, W) and its class label (scalar, int64).

    A `torch.utils.data.DataLoader` asks for a whole batch of indices at once (``__getitems__``), so the transform
    runs once a batch, not once an image.

    Args:
        images: Raw images (N, C, H, W), uint8, or `ImageFiles`.
        labels: Class labels (N,), int64.
        transform: From raw images (B, C, H, W) to what a model takes.

    Raises:
        ValueError: If there are not as many labels as images.

    Example:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> data = LabeledImages(images, torch.tensor([0, 1, 1]), ImageTransform(mean=(0.5,), std=(0.5,)))
        >>> image, label = data[2]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), tensor(1))
    """

    def __init__(self, images: Tensor | ImageFiles, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        if len(images) != len(labels):
            raise ValueError(f"labels: expected one for each of the {len(images)} images, got {len(labels)}")
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples of a batch."""
        chosen = torch.tensor(indices)
        images = self.transform(self.images[chosen])
        return list(zip(images.unbind(), self.labels[chosen].unbind(), strict=True))

    def with_transform(self, transform: Callable[[Tensor], Tensor]) -> "LabeledImages":
        """The same images under another transform; the pixels are shared, not copied."""
        return LabeledImages(self.images, self.labels, transform)
