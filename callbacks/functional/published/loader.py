"""The data as PyHessian gets it: a loader of batches of any kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.callbacks.functional.common.batches import Batch, batch_size
from moe_heads.callbacks.functional.common.monitor import Monitor

__all__ = ["Carried", "Loader"]


@dataclass(frozen=True)
class Carried:
    """A batch of any kind behind the two methods that PyHessian calls on a tensor of inputs."""

    batch: Batch

    def size(self, dim: int) -> int:
        """Number of samples."""
        return batch_size(self.batch)

    def to(self, device: torch.device) -> "Carried":
        """Nothing: the batch is where it has to be."""
        return self


class Loader:
    """The batches as PyHessian's data loader; one pass is one Hessian-vector product.

    Attributes:
        num_passes: Products so far.
        strays: Gradients of tensors outside the parameters, as they were; put back after each batch.
    """

    def __init__(self, data: Sequence[Batch], monitor: Monitor) -> None:
        self._carried = [Carried(batch) for batch in data]
        self._monitor = monitor
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
