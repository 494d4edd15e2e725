"""Labeled images in whole batches, from memory or from files, with tensor transforms of a batch at once.

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
"""Pixels of a random crop outside the image."""


@dataclass(frozen=True)
class ImageTransform:
    """Transform of raw images to normalized floats, (x / max_value - mean) / std, with optional random crops and flips.

    Each image of the batch has its own random crop and flip, from the global generator of torch.

    Attributes:
        mean: Mean of each channel on the scale of 0 to 1.
        std: Standard deviation of each channel on the scale of 0 to 1.
        padding: Pixels added on every side before a random crop of the original size, 0 for no crop.
        flip: Whether to mirror an image left to right with probability 1/2.
        max_value: Raw value that corresponds to 1.
        border: Added pixels: "black", or the pixels of the image mirrored at its edge ("reflect").

    Raises:
        ValueError: If ``border`` is neither of the two.

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
        """Transform raw images (B, C, H, W), uint8, to floats (B, C, H, W)."""
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
    # every window of the original size, as a view: (B, C, 2·padding + 1, 2·padding + 1, H, W)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, num_images))
    return windows[torch.arange(num_images), :, top, left]


def _mirrored(images: Tensor, padding: int) -> Tensor:
    """Add reflected borders by indexing, since the reflection padding of torch does not support integers."""
    if padding >= min(images.shape[2:]):
        raise ValueError(
            f"padding: expected less than the side of the image for border='reflect', got {padding}. Use a smaller"
            " padding or border='black'."
        )
    rows, columns = (torch.arange(-padding, size + padding).abs() for size in images.shape[2:])
    height, width = images.shape[2:]
    rows, columns = torch.minimum(rows, 2 * (height - 1) - rows), torch.minimum(columns, 2 * (width - 1) - columns)
    return images[:, :, rows[:, None], columns]


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded to RGB on indexing.

    Attributes:
        paths: The files.
        height: H.
        width: W.
        resize: Whether to scale an image until it covers H x W and crop the center. Otherwise any other size is an
            error.
    """

    paths: Sequence[Path]
    height: int
    width: int
    resize: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the raw images (B, 3, H, W), uint8, of the indices (B,).

        Raises:
            ValueError: If a file is not an image or has a different size.
        """
        images = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)
        for position, index in enumerate(indices.tolist()):
            images[position] = np.asarray(self._decode(self.paths[index]))
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def select(self, indices: Tensor) -> "ImageFiles":
        """Return the files of the indices (B,)."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()])

    def _decode(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"{path}: expected a readable image, got an error: {error}. Replace or remove the file."
            ) from error
        if self.resize:
            image = ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)
        check_size(path, image.size, (self.width, self.height))
        return image


def check_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Check that an image has the expected (width, height)."""
    if size != expected:
        came, wanted = ("x".join(map(str, pixels)) for pixels in (size, expected))
        raise ValueError(
            f"{path}: expected {wanted} pixels as in the first image, got {came}. Pass image_size to resize the images."
        )


class LabeledImages(Dataset[tuple[Tensor, Tensor]]):
    """Data set of pairs of a transformed image (C, H, W) and its class label (scalar, int64).

    A `torch.utils.data.DataLoader` requests a whole batch of indices at once (``__getitems__``), so the transform
    runs once per batch, not once per image.

    Args:
        images: Raw images (N, C, H, W), uint8, or `ImageFiles`.
        labels: Class labels (N,), int64.
        transform: Function from raw images (B, C, H, W) to the inputs of a model.

    Raises:
        ValueError: If the numbers of labels and images differ.

    Example:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> data = LabeledImages(images, torch.tensor([0, 1, 1]), ImageTransform(mean=(0.5,), std=(0.5,)))
        >>> image, label = data[2]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), tensor(1))
    """

    def __init__(self, images: Tensor | ImageFiles, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        if len(images) != len(labels):
            raise ValueError(f"labels: expected one for each of the {len(images)} images, got {len(labels)}.")
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the samples of a batch."""
        chosen = torch.tensor(indices)
        images = self.transform(self.images[chosen])
        return list(zip(images.unbind(), self.labels[chosen].unbind(), strict=True))

    def with_transform(self, transform: Callable[[Tensor], Tensor]) -> "LabeledImages":
        """Return the same images with a different transform. The pixels are shared, not copied."""
        return LabeledImages(self.images, self.labels, transform)
