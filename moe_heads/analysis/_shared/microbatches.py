"""Batches on the device of a model, evaluated one after the other and cut smaller where memory runs out."""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from moe_heads.analysis._shared.batch_list import Batches, Piece, halves_of
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.progress import Progress

__all__ = ["Microbatches", "free_memory", "is_out_of_memory", "unless_out_of_memory"]

T = TypeVar("T")


class Microbatches:
    """The data of an analysis on one device.

    A function that is the mean over the samples of a batch has the same weighted mean over all batches however they are
    cut, so a batch that does not fit into memory is halved and the result stays the same. The halves stay halves.

    Args:
        batches: The data; `Batches` bring their numbers of samples and weights along.
        device: Where the model is.
        progress: Looked at before each batch.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of a batch; by default its number of samples. Batches of
            weight 0 are left out.

    Attributes:
        num_samples: Samples in all batches that have a weight.
        total_weight: Sum of the weights.
        origins: For each batch or piece of one, the place of the batch among those that were given.

    Raises:
        ValueError: If the data is empty, or the number of samples of a batch is not known.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        device: torch.device,
        progress: Progress,
        *,
        batch_size_fn: BatchSizeFn | None = None,
        batch_weight_fn: BatchWeightFn | None = None,
    ) -> None:
        given = Batches.of(batches, batch_size_fn, batch_weight_fn)
        self._weight_fn, self._monitor = given.weight_fn, progress
        self._pieces = given.to(device).pieces
        self.origins = list(range(len(self._pieces)))
        self.num_samples, self.total_weight = sum(self.sizes), sum(self.weights)
        self._is_mean = not any(found.size for _, found in given.checked.values())

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each batch or piece of one."""
        return [piece.size for piece in self._pieces]

    @property
    def weights(self) -> list[float]:
        """Weight of each batch or piece of one."""
        return [piece.weight for piece in self._pieces]

    def __iter__(self) -> Iterator[Batch]:
        """The batches themselves: whoever hands one to a function of the user copies it."""
        return (piece.batch for piece in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def evaluate(
        self,
        function: Callable[[int, Batch], T],
        *,
        wanted: Callable[[int], bool] = lambda origin: True,
        copies: bool = True,
    ) -> Iterator[tuple[float, T]]:
        """Call ``function(index, batch)`` for each batch.

        Args:
            function: Called with the place of the batch, or piece of one, and the batch.
            wanted: Whether to call it for the pieces of the batch that was given at a place; by default all.
            copies: Whether to call it with a copy of the batch, so that it may change it; False for a function that
                copies what it hands on.

        Yields:
            The weight of the batch, and what the function returned.

        Raises:
            MemoryError: If there is no memory for a batch that cannot be cut.
        """
        index = 0
        while index < len(self._pieces):
            if not wanted(self.origins[index]):
                index += 1
                continue
            self._monitor.tick()
            piece = self._pieces[index]
            try:
                value = function(index, own_copy(piece.batch) if copies else piece.batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                _refuse_if_indivisible(piece, error)
            else:
                yield piece.weight, value
                index += 1
                continue
            # outside the except clause: its traceback holds what did not fit
            self._halve(index)

    def _halve(self, index: int) -> None:
        free_memory()
        if not self._is_mean:
            self._monitor.warn(
                f"memory ran out for a batch of {self._pieces[index].size} samples, which was halved, and the loss"
                " depends on how the samples are cut into batches: the result is of smaller batches than were asked for"
            )
        halves = [half for half in halves_of(self._pieces[index], self._weight_fn) if half.weight > 0]
        self._pieces[index : index + 1] = halves
        self.origins[index : index + 1] = [self.origins[index]] * len(halves)


def _refuse_if_indivisible(piece: Piece, error: Exception) -> None:
    if not piece.is_divisible:
        what = "a single sample" if piece.size == 1 else f"a batch of {piece.size} samples that cannot be cut"
        raise MemoryError(
            f"there is not enough memory for {what} ({error}); analyze a smaller model, fewer samples at a time"
            " (batch_size), or on another device"
        ) from error


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
