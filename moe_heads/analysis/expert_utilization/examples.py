"""Samples that each expert receives with the highest gate.

Shapes: B samples of a batch, E experts, n examples per expert, (C, H, W) an image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.analysis._shared.batches import Batch
from moe_heads.routing import Routing

__all__ = ["ExpertExamples", "images_of", "read_images"]


# Largest side of a stored image in pixels, and largest number of experts with images: 25 MB with eight images each.
_MAX_SIDE, _MAX_EXPERTS = 64, 256


@dataclass(frozen=True, eq=False)
class ExpertExamples:
    """Images that each of the first 256 experts received with the highest gates, in descending order, on the CPU.

    Attributes:
        images: Images of at most 64 pixels per side, uint8, (E, n, C, H, W). Each is scaled to its own range of values,
            since it may be normalized.
        gates: Largest gate among the rows of the sample, (E, n), float64. It is 0 if an expert received fewer than n
            samples, and the image is then meaningless.
        labels: Classes, (E, n), int64. They are -1 without labels.
    """

    images: Tensor
    gates: Tensor
    labels: Tensor

    @classmethod
    def of(cls, routing: Routing, images: Tensor, labels: Tensor | None, count: int) -> "ExpertExamples":
        """Select the examples of a batch.

        Args:
            routing: Routing of the batch, on the CPU.
            images: (B, C, H, W).
            labels: (B,).
            count: n.
        """
        gates = torch.where(routing.valid.unsqueeze(-1), routing.gates, 0).double()
        best = gates.view(-1, routing.rows_per_sample, routing.num_experts).amax(1).t()[:_MAX_EXPERTS]
        if labels is None:
            labels = torch.full((len(images),), -1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        shown = _thumbnails(images.detach()[chosen.flatten().to(images.device)].cpu().float())
        return cls(shown.view(*chosen.shape, *shown.shape[1:]), best.gather(-1, chosen), labels[chosen])

    def merged(self, other: "ExpertExamples", count: int) -> "ExpertExamples":
        """Return the best n of both. The other images are resized to the size of the own ones."""
        size, theirs = self.images.shape[2:], other.images
        if theirs.shape[2] != size[0]:
            theirs = theirs[:, :, :1].expand(-1, -1, size[0], -1, -1)
        if theirs.shape[2:] != size:
            resized = F.interpolate(theirs.flatten(0, 1).float(), size=size[1:])
            theirs = resized.to(torch.uint8).view(*theirs.shape[:2], *size)
        images = torch.cat([self.images, theirs], 1)
        gates, labels = torch.cat([self.gates, other.gates], 1), torch.cat([self.labels, other.labels], 1)
        chosen = gates.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        rows = torch.arange(len(gates)).unsqueeze(1)
        return ExpertExamples(images[rows, chosen], gates[rows, chosen], labels[rows, chosen])


def _thumbnails(images: Tensor) -> Tensor:
    """Scale images (N, C, H, W) of any range to at most 64 pixels per side, uint8."""
    images = images.nan_to_num()
    height, width = images.shape[-2:]
    scale = max(height, width) / _MAX_SIDE
    if scale > 1:
        images = F.adaptive_avg_pool2d(images, (max(1, round(height / scale)), max(1, round(width / scale))))
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (255 * (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)).to(torch.uint8)


def read_images(image_fn: Callable[[Batch], Tensor | None], batch: Batch, num_samples: int) -> Tensor | None:
    """Return the images of a batch, or None.

    Raises:
        ValueError: If they are not one image with one or three channels per sample.
    """
    images = image_fn(batch)
    if images is None:
        return None
    got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"image_fn: expected images (B, C, H, W) with one or three channels, or None, got {got}.")
    if len(images) != num_samples:
        raise ValueError(f"image_fn: expected an image for each of the {num_samples} samples, got {got}.")
    return images


def images_of(batch: Batch) -> Tensor | None:
    """Return the first entry of a batch (or the batch) if it has images (B, C, H, W) of one or three channels."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    is_image = isinstance(first, Tensor) and first.dim() == 4 and first.shape[1] in (1, 3)
    return first if is_image else None
