"""Batches on the device of a model, evaluated one after the other and cut smaller where memory runs out."""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from moe_heads.callbacks.functional.common.batches import Batch, as_batches, batch_size, cut, is_divisible, to_device
from moe_heads.callbacks.functional.common.monitor import Monitor

__all__ = ["Microbatches", "free_memory", "is_out_of_memory", "unless_out_of_memory"]

T = TypeVar("T")


class Microbatches:
    """The data of an analysis on one device.

    A function that is the mean over the samples of a batch has the same mean over all samples however they are cut, so
    a batch that does not fit into memory is halved and the result stays the same. The halves stay halves.

    Args:
        batches: The data.
        device: Where the model is.
        monitor: Looked at before each batch.

    Attributes:
        num_samples: Samples in all.
        origins: For each batch or piece of one, the place of the batch among those that were given.

    Raises:
        ValueError: If the data is empty.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, monitor: Monitor) -> None:
        self._batches = [to_device(batch, device) for batch in as_batches(batches)]
        self._monitor = monitor
        self.origins = list(range(len(self._batches)))
        self.num_samples = sum(map(batch_size, self._batches))
        self.weights = [float(batch_size(batch)) for batch in self._batches]
        self.total_weight = sum(self.weights)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def evaluate(
        self, function: Callable[[int, Batch], T], *, wanted: Callable[[int], bool] = lambda origin: True
    ) -> Iterator[tuple[int, T]]:
        """Call ``function(index, batch)`` for each batch.

        Args:
            function: Called with the place of the batch, or piece of one, and the batch.
            wanted: Whether to call it for the pieces of the batch that was given at a place; by default all.

        Yields:
            The number of samples of the batch, and what the function returned.

        Raises:
            MemoryError: If there is no memory for a batch that cannot be cut.
        """
        index = 0
        while index < len(self._batches):
            if not wanted(self.origins[index]):
                index += 1
                continue
            self._monitor.tick()
            try:
                value = function(index, self._batches[index])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refuse_if_indivisible(index, error)
            else:
                yield batch_size(self._batches[index]), value
                index += 1
                continue
            # outside the except clause: its traceback holds what did not fit
            self._halve(index)

    def _refuse_if_indivisible(self, index: int, error: Exception) -> None:
        size = batch_size(self._batches[index])
        if size == 1 or not is_divisible(self._batches[index]):
            what = "a single sample" if size == 1 else f"a batch of {size} samples that cannot be cut"
            raise MemoryError(
                f"there is not enough memory for {what} ({error}); analyse a smaller model, fewer samples at a time"
                " (batch_size), or on another device"
            ) from error

    def _halve(self, index: int) -> None:
        free_memory()
        batch = self._batches[index]
        size = batch_size(batch)
        self._batches[index : index + 1] = [cut(batch, 0, size // 2), cut(batch, size // 2, size)]
        self.origins.insert(index, self.origins[index])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # what the CPU's allocator and cuDNN say, which have no class of their own
    signs = ("can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """What ``compute`` returns, or None when memory runs out in it."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def free_memory() -> None:
    """Give back what an attempt that failed has left on the GPU; the CPU's memory is free when its error is gone."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
