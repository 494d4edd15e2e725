"""The samples that each expert receives with the highest gate.

Shapes: B samples of a batch, E experts, n examples an expert, (C, H, W) an image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.analysis._shared.batches import Batch
from moe_heads.routing import Routing

__all__ = ["ExpertExamples", "images_by", "images_of"]


# Pixels of a side beyond which an image is made smaller, and experts of which images are kept: 25 MB with eight each.
_MAX_SIDE, _MAX_EXPERTS = 64, 256


@dataclass(frozen=True, eq=False)
class ExpertExamples:
    """The images that each of the first 256 experts received with the highest gate, the highest first; on the CPU.

    Attributes:
        images: At most 64 pixels a side, each stretched to its own range of values since it may come normalized, uint8,
            (E, n, C, H, W).
        gates: The largest gate of the sample's rows, (E, n), float64; 0 where an expert received fewer than n samples:
            that image means nothing.
        labels: Classes, (E, n), int64; -1 without labels.
    """

    images: Tensor
    gates: Tensor
    labels: Tensor

    @classmethod
    def of(cls, routing: Routing, images: Tensor, labels: Tensor | None, count: int) -> "ExpertExamples":
        """Those of a batch.

        Args:
            routing: Its routing, on the CPU.
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
        """The best n of both; images of another size take that of the first ones."""
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
    """(N, C, H, W) of any values → at most 64 pixels a side, uint8."""
    images = images.nan_to_num()
    height, width = images.shape[-2:]
    scale = max(height, width) / _MAX_SIDE
    if scale > 1:
        images = F.adaptive_avg_pool2d(images, (max(1, round(height / scale)), max(1, round(width / scale))))
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (255 * (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)).to(torch.uint8)


def images_by(image_fn: Callable[[Batch], Tensor | None], batch: Batch, num_samples: int) -> Tensor | None:
    """The images of a batch, or None.

    Raises:
        ValueError: If they are not one image with one channel or three for each sample.
    """
    images = image_fn(batch)
    if images is None:
        return None
    got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"image_fn: expected images (B, C, H, W) with one channel or three, or None, got {got}")
    if len(images) != num_samples:
        raise ValueError(f"image_fn: expected an image for each of the {num_samples} samples, got {got}")
    return images


def images_of(batch: Batch) -> Tensor | None:
    """The first entry of a batch (or the batch) if it can be shown: (B, C, H, W) with one channel or three."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    is_image = isinstance(first, Tensor) and first.dim() == 4 and first.shape[1] in (1, 3)
    return first if is_image else None
