"""Batches on the device of a model, evaluated one after the other and halved when memory runs out."""

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
    """Data of an analysis on one device.

    If a function is the mean over the samples of a batch, its weighted mean over all batches does not depend on the
    division into batches. A batch that does not fit into memory is therefore halved, and the result stays the same.
    Halved batches stay halved in later evaluations.

    Args:
        batches: The data. `Batches` keep their numbers of samples and weights.
        device: Device of the model.
        progress: Its time limit is checked before each batch.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default inferred from its tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of a batch; by default its number of samples. Batches of
            weight 0 are skipped.

    Attributes:
        num_samples: Number of samples in all batches with a weight above zero.
        total_weight: Sum of the weights.
        origins: Index of the original batch for each batch or part of a batch.

    Raises:
        ValueError: If the data is empty, or the number of samples of a batch is unknown.
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
        """Number of samples of each batch or part of a batch."""
        return [piece.size for piece in self._pieces]

    @property
    def weights(self) -> list[float]:
        """Weight of each batch or part of a batch."""
        return [piece.weight for piece in self._pieces]

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches themselves; callers copy a batch before passing it to a user's function."""
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
            function: Called with the index of the batch or part of a batch, and with the batch.
            wanted: Returns whether to evaluate the parts of the original batch at an index. By default all are.
            copies: Whether to pass a copy of the batch, so that the function may change it. False for a function that
                makes its own copy.

        Yields:
            Weight of the batch and return value of the function.

        Raises:
            MemoryError: If a batch that cannot be cut does not fit into memory.
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
                _raise_if_indivisible(piece, error)
            else:
                yield piece.weight, value
                index += 1
                continue
            # outside the except clause: its traceback references the tensors of the failed attempt
            self._halve(index)

    def _halve(self, index: int) -> None:
        free_memory()
        if not self._is_mean:
            self._monitor.warn(
                f"memory ran out for a batch of {self._pieces[index].size} samples, which was halved. The loss depends"
                " on the division into batches, so the result belongs to smaller batches than requested."
            )
        halves = [half for half in halves_of(self._pieces[index], self._weight_fn) if half.weight > 0]
        self._pieces[index : index + 1] = halves
        self.origins[index : index + 1] = [self.origins[index]] * len(halves)


def _raise_if_indivisible(piece: Piece, error: Exception) -> None:
    if not piece.is_divisible:
        what = "a single sample" if piece.size == 1 else f"a batch of {piece.size} samples that cannot be cut"
        raise MemoryError(
            f"there is not enough memory for {what} ({error}). Analyze a smaller model, use fewer samples at a time"
            " (batch_size), or use another device."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that the memory of a GPU or of the machine ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # messages of the CPU allocator, cuDNN and cuBLAS, whose errors have no class of their own
    signs = ("can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """Return ``compute()``, or None if it runs out of memory."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def free_memory() -> None:
    """Release GPU memory that a failed attempt left behind; CPU memory is free once the error is discarded."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
