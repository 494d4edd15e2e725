"""Batches of an analysis with their numbers of samples and their weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from moe_heads.analysis._shared.batches import (
    Batch,
    cut,
    is_divisible,
    is_movable_object,
    leaves_of,
    to_device,
)
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.counting import (
    BatchSizeFn,
    BatchWeightFn,
    batch_size,
    checked_size,
    checked_weight,
)
from moe_heads.analysis._shared.generators import generators_kept

__all__ = ["Batches", "Piece", "check_is_list", "halves_of"]


@dataclass(frozen=True)
class Piece:
    """A batch or a part of a batch.

    Attributes:
        batch: Input of the loss function.
        size: Number of samples.
        weight: Weight of the batch loss in the mean.
        may_cut: Whether the samples may be divided into smaller batches.
    """

    batch: Batch
    size: int
    weight: float
    may_cut: bool

    @property
    def is_divisible(self) -> bool:
        """True if the batch can be halved: every tensor has one row for each sample."""
        return self.may_cut and self.size > 1 and is_divisible(self.batch) and _num_rows(self.batch) == self.size


class Batches(Sequence[Batch]):
    """Batches with known numbers of samples, accepted by the analyses in place of a list.

    Args:
        batches: The batches.
        sizes: Number of samples of each batch.
        size_fn: The ``batch_size_fn`` that counted the samples, or None.
        weight_fn: ``batch_weight_fn``. By default the weight of a batch is its number of samples.
        may_cut: Whether the samples of a batch may be divided, for example when memory runs out.

    Attributes:
        sizes: Number of samples of each batch.
        weights: Weight of each batch.
        size_fn: The argument.
        weight_fn: The argument.
        may_cut: The argument.
        checked: Results of `mean_check.check_mean` by loss function.

    Raises:
        ValueError: If there is no batch, a batch holds no sample, or all weights are zero.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        sizes: Sequence[int],
        *,
        size_fn: BatchSizeFn | None = None,
        weight_fn: BatchWeightFn | None = None,
        may_cut: bool = True,
    ) -> None:
        if batches and size_fn is not None and not all(sizes):
            raise ValueError(
                f"batch_size_fn: expected at least one sample in each batch, got 0 for batches[{list(sizes).index(0)}]."
            )
        if not batches or not all(sizes):
            raise ValueError(
                "batches: expected at least one batch with at least one sample each, got an empty loader or batch."
            )
        self._batches, self.sizes = list(batches), tuple(sizes)
        self.size_fn, self.weight_fn, self.may_cut = size_fn, weight_fn, may_cut
        self.weights: tuple[float, ...] = self.sizes
        if weight_fn is not None:
            self.weights = tuple(
                checked_weight(weight_fn, own_copy(batch), f"batches[{index}]")
                for index, batch in enumerate(self._batches)
            )
        if not any(self.weights):
            raise ValueError("batch_weight_fn: expected a weight above 0 for at least one batch, got zeros.")
        self.checked: dict[int, tuple[Any, Any]] = {}

    @classmethod
    def of(
        cls,
        batches: Iterable[Batch],
        batch_size_fn: BatchSizeFn | None = None,
        batch_weight_fn: BatchWeightFn | None = None,
    ) -> "Batches":
        """Count the samples of the batches unless the numbers are known.

        Args:
            batches: The data. `Batches` keep their numbers and weights unless another function is given.
            batch_size_fn: Returns the number of samples of a batch. By default `batch_size` infers it from the tensors.
            batch_weight_fn: Returns the weight of a batch. By default its number of samples.

        Raises:
            ValueError: If there is no batch, a batch holds no sample or an unknown number of samples, or a single batch
                is given in place of the list.
        """
        if isinstance(batches, Batches):
            size_fn, weight_fn = batch_size_fn or batches.size_fn, batch_weight_fn or batches.weight_fn
            if size_fn is batches.size_fn and weight_fn is batches.weight_fn:
                return batches
            sizes: Sequence[int] = batches.sizes if size_fn is batches.size_fn else _sizes(batches, size_fn)
            return cls(batches, sizes, size_fn=size_fn, weight_fn=weight_fn, may_cut=batches.may_cut)
        check_is_list(batches, "batches")
        # a loader draws its seed, order and augmentation from the global generators, which belong to the user
        with generators_kept() if isinstance(batches, DataLoader) else nullcontext():
            listed = list(batches)
        return cls(listed, _sizes(listed, batch_size_fn), size_fn=batch_size_fn, weight_fn=batch_weight_fn)

    @property
    def num_samples(self) -> int:
        """Total number of samples."""
        return sum(self.sizes)

    @property
    def total_weight(self) -> float:
        """Sum of the weights."""
        return sum(self.weights)

    @property
    def pieces(self) -> list[Piece]:
        """The batches with a weight above zero."""
        parts = zip(self._batches, self.sizes, self.weights, strict=True)
        return [Piece(batch, size, weight, self.may_cut) for batch, size, weight in parts if weight > 0]

    def to(self, device: torch.device) -> "Batches":
        """Return the batches on ``device`` with the same numbers and weights; this object is unchanged."""
        there = [to_device(_free_to_move(batch), device) for batch in self._batches]
        moved = Batches(there, self.sizes, may_cut=self.may_cut)
        moved.size_fn, moved.weight_fn, moved.weights = self.size_fn, self.weight_fn, self.weights
        moved.checked = self.checked
        return moved

    @override
    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    @override
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        return self._batches[index]


def halves_of(piece: Piece, weight_fn: BatchWeightFn | None) -> list[Piece]:
    """Cut a piece into two halves whose weights add up to the weight of the piece.

    Without this normalization, a ``batch_weight_fn`` that returns a constant would count the piece twice.
    """
    middle = piece.size // 2
    batches = [cut(piece.batch, 0, middle), cut(piece.batch, middle, piece.size)]
    sizes: list[int] = [middle, piece.size - middle]
    weights: Sequence[float] = sizes
    if weight_fn is not None:
        weights = [checked_weight(weight_fn, own_copy(batch), "a half of a batch") for batch in batches]
        if not any(weights):
            weights = sizes
        weights = [piece.weight * weight / sum(weights) for weight in weights]
    parts = zip(batches, sizes, weights, strict=True)
    return [Piece(batch, size, weight, piece.may_cut) for batch, size, weight in parts]


def check_is_list(batches: Any, name: str, expected: str = "a list of batches") -> None:
    """Raise an error if a single batch is given in place of the list of batches.

    Raises:
        ValueError: If it is a tensor, a mapping, or a tuple or list that looks like the entries of a single batch.
    """
    got = ""
    if isinstance(batches, Tensor):
        got = f"one tensor of shape {tuple(batches.shape)}. Pass [tensor]."
    elif isinstance(batches, Mapping):
        got = f"a mapping with the keys {list(batches)[:5]}. Pass [batch]."
    elif isinstance(batches, (tuple, list)) and any(isinstance(entry, Tensor) for entry in batches):
        tensors = [entry for entry in batches if isinstance(entry, Tensor)]
        forms = {(tensor.dim(), tensor.dtype) for tensor in tensors}
        # batches may be of different kinds, but a number, a string or None is not a batch
        others = [entry for entry in batches if not isinstance(entry, Tensor)]
        is_batch = len(forms) > 1 or any(entry is None or isinstance(entry, (int, float, str)) for entry in others)
        if isinstance(batches, tuple) or is_batch:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:5])
            got = f"a {type(batches).__name__} with tensors of shapes {shapes}, which is one batch. Pass [(X, y)]."
    elif isinstance(batches, (str, bytes)) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        got = f"{batches!r}."
    if got:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _sizes(batches: Sequence[Batch], size_fn: Callable[[Batch], int] | None) -> list[int]:
    names = (f"batches[{index}]" for index in range(len(batches)))
    if size_fn is None:
        return [batch_size(batch, name) for batch, name in zip(batches, names, strict=True)]
    return [checked_size(size_fn, own_copy(batch), name) for batch, name in zip(batches, names, strict=True)]


def _free_to_move(batch: Batch) -> Batch:
    """Return the batch, or a copy if it contains objects whose ``to`` may modify them in place."""
    return own_copy(batch) if any(map(is_movable_object, leaves_of(batch))) else batch


def _num_rows(batch: Batch) -> int:
    return next(len(leaf) for leaf in leaves_of(batch) if leaf is not None)
