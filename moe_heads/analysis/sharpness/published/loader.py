"""The data as PyHessian gets it: a loader of batches of any kind."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.progress import Progress

__all__ = ["Carried", "Loader"]


@dataclass(frozen=True)
class Carried:
    """A batch of any kind behind the two methods that PyHessian calls on a tensor of inputs."""

    batch: Batch
    weight: float

    def size(self, dim: int) -> float:
        """Weight of the batch: its number of samples, unless another one was asked for."""
        return self.weight

    def to(self, device: torch.device) -> "Carried":
        """Nothing: the batch is where it has to be."""
        return self


class Loader:
    """The batches as PyHessian's data loader; one pass is one Hessian-vector product.

    Attributes:
        num_passes: Products so far.
        strays: Gradients of tensors outside the parameters, as they were; put back after each batch.
    """

    def __init__(self, data: Batches, progress: Progress) -> None:
        self._carried = [Carried(piece.batch, piece.weight) for piece in data.pieces]
        self._monitor = progress
        self.num_passes = 0
        self.strays: list[tuple[Tensor, Tensor | None]] = []

    def __iter__(self) -> Iterator[tuple[Carried, Carried]]:
        for carried in self._carried:
            self._monitor.tick()
            yield carried, carried
            self.put_back()
        self.num_passes += 1
        self._monitor.step(self.num_passes)

    def put_back(self) -> None:
        """Put the gradients of the strays back, which breaks the cycle between each and its graph."""
        for stray, grad in self.strays:
            stray.grad = grad
        self.strays.clear()
