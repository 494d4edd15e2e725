"""The samples that each expert receives with the highest gate.

Shapes: B samples of a batch, E experts, n examples an expert, (C, H, W) an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.callbacks.functional.common.batches import Batch
from moe_heads.routing import Routing

__all__ = ["ExpertExamples", "images_of"]


@dataclass(frozen=True, eq=False)
class ExpertExamples:
    """The images that each expert received with the highest gate, the highest first; all on the CPU.

    Attributes:
        images: As the model saw them, (E, n, C, H, W).
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
        best = gates.view(-1, routing.rows_per_sample, routing.num_experts).amax(1).t()
        if labels is None:
            labels = torch.full((len(images),), -1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        there = chosen.flatten().to(images.device)
        shown = images.detach()[there].cpu().view(*chosen.shape, *images.shape[1:])
        return cls(shown, best.gather(-1, chosen), labels[chosen])

    def merged(self, other: "ExpertExamples", count: int) -> "ExpertExamples":
        """The best n of both."""
        images, gates, labels = (
            torch.cat([getattr(self, name), getattr(other, name)], 1) for name in ("images", "gates", "labels")
        )
        chosen = gates.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        rows = torch.arange(len(gates)).unsqueeze(1)
        return ExpertExamples(images[rows, chosen], gates[rows, chosen], labels[rows, chosen])


def images_of(batch: Batch) -> Tensor | None:
    """The first entry of a batch (or the batch) if it can be shown: (B, C, H, W) with one channel or three."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    is_image = isinstance(first, Tensor) and first.dim() == 4 and first.shape[1] in (1, 3)
    return first if is_image else None
