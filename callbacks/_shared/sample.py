"""Sample of a split for an analysis, drawn deterministically from the data set of its loader."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader, Dataset, IterableDataset

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.counting import BatchSizeFn, batch_size, checked_size
from moe_heads.analysis._shared.progress import Progress
from moe_heads.callbacks._shared.combined_sample import Part, combined
from moe_heads.callbacks._shared.loader_indices import draw_index_batches, gives_batches, keys_of
from moe_heads.callbacks._shared.trainer_access import Split, mode_of, uncombined

__all__ = ["Sample", "draw_sample"]


@dataclass(frozen=True)
class Sample:
    """Batches of an analysis and their origin.

    Attributes:
        split: "train", "val" or "test".
        batches: The batches as returned by the collate function (on the CPU), with their numbers of samples.
        num_samples: Number of samples in the batches.
        num_available: Number of samples in the whole split; None if unknown.
        description: Description of the draw for the report.
        are_exchangeable: Whether every batch is a random subset of the drawn samples, so that the spread over batches
            is a valid error estimate. False for the batches of a stream, of a batch sampler, or of several loaders.
    """

    split: Split
    batches: Batches
    num_samples: int
    num_available: int | None
    description: str
    are_exchangeable: bool = False


def draw_sample(
    split: Split,
    loaders: Any,
    num_samples: int,
    size: int,
    seed: int,
    *,
    dataset: Any | None = None,
    num_batches: int | None = None,
    progress: Progress | None = None,
    is_size_default: bool = False,
    batch_size_fn: BatchSizeFn | None = None,
) -> Sample:
    """Draw the analysis batches of a split.

    From a data set with a length, ``num_samples`` indices are drawn without repetition by a generator seeded with
    ``seed``, and put into batches in random order. `draw_index_batches` lists the samplers that are respected. From an
    iterable data set, a data set that returns whole batches, and any other iterable, the first batches are used.

    A collection of training loaders gives batches of the same structure, combined as in Lightning. Of several
    validation or test loaders, the first is used.

    Args:
        split: "train", "val" or "test".
        loaders: The trainer's loader or loaders of the split.
        num_samples: Number of samples to draw from each loader, limited to the size of the data set.
        size: Samples in a batch.
        seed: Seed of the draw.
        dataset: The un-augmented data set, if available; by default the data set of the loader.
        num_batches: Draw only from this many first batches of the loader (``overfit_batches``).
        progress: Receives a step for each batch.
        is_size_default: Whether ``size`` is a default. Then the batches are no larger than those of the loader, and
            those of several loaders are as large as in training.
        batch_size_fn: Returns the number of samples of a batch; by default its number of indices.

    Returns:
        The sample.

    Raises:
        MisconfigurationException: If a loader cannot be iterated repeatedly.
        ValueError: If a data set is empty.
    """
    draw = _Draw(split, num_samples, size, seed, num_batches, progress or Progress(), is_size_default, batch_size_fn)
    # a DataLoader counts as a leaf
    paths, structure = tree_flatten_with_path(uncombined(loaders))
    leaves = [leaf for _, leaf in paths]
    if dataset is not None and len(leaves) == 1 and isinstance(leaves[0], DataLoader):
        return draw.of_dataset(dataset, leaves[0], "un-augmented data set of the data module")
    if structure.is_leaf():
        return draw.of_loader(leaves[0])
    if split != "train":
        first = draw.of_loader(leaves[0])
        others = f"; the other {len(leaves) - 1} of {len(leaves)} loaders are left out" if len(leaves) > 1 else ""
        return replace(first, description=first.description + others)
    mode = mode_of(loaders)
    sizes = draw.sizes_in_proportion(leaves)
    num_steps = -(-num_samples // max(sizes))
    parts = []
    for (path, leaf), own in zip(paths, sizes, strict=True):
        sample = replace(draw, num_samples=num_steps * own, size=own, is_size_default=False).of_loader(leaf)
        parts.append(Part(keystr(path), sample.batches[:num_steps], sample.batches.sizes, sample.description))
    batches, described = combined(parts, structure, mode)
    return Sample(split, batches, batches.num_samples, None, described)


@dataclass(frozen=True)
class _Draw:
    """Options of a draw."""

    split: Split
    num_samples: int
    size: int
    seed: int
    num_batches: int | None
    progress: Progress
    is_size_default: bool
    size_fn: BatchSizeFn | None

    def sizes_in_proportion(self, loaders: list[Any]) -> list[int]:
        """Return the batch sizes of several loaders, scaled so that the largest is the requested size."""
        own = [getattr(loader, "batch_size", None) for loader in loaders]
        known = [size for size in own if isinstance(size, int)]
        largest = max(known, default=self.size)
        scale = 1.0 if self.is_size_default else self.size / largest
        return [max(1, round(scale * size)) if isinstance(size, int) else self.size for size in own]

    def of_loader(self, loader: Any) -> Sample:
        origin = "data set of the loader, unchanged"
        if isinstance(loader, DataLoader):
            if loader.batch_sampler is not None or gives_batches(loader):
                return self.of_dataset(loader.dataset, loader, origin)
            return self._of_whole_batches(self._batch_loader(loader), origin)
        if not isinstance(loader, Iterable):
            raise MisconfigurationException(f"{self.split} loader: expected an iterable, got {type(loader).__name__}.")
        if isinstance(loader, Iterator):
            # reading it would consume batches of the training
            raise MisconfigurationException(
                f"{self.split} loader: expected an iterable that can be iterated repeatedly, got the iterator"
                f" {type(loader).__name__}. Pass a DataLoader, a list, or an object whose __iter__ returns a new"
                " iterator."
            )
        return self._of_whole_batches(loader, getattr(loader, "origin", origin))

    def of_dataset(self, dataset: Dataset[Any], loader: DataLoader[Any], origin: str) -> Sample:
        size = min(self.size, loader.batch_size or self.size) if self.is_size_default else self.size
        # a loader without its own generator would draw from the global one
        options: dict[str, Any] = {"collate_fn": _Counting(loader.collate_fn), "generator": self._generator()}
        if isinstance(dataset, IterableDataset):
            found = self._read(dataset, loader, {**options, "batch_size": size}, None)
            return self._sample(found, None, f"first batches; {origin}")
        drawn = draw_index_batches(
            loader, self.num_samples, size, self.seed, dataset=dataset, num_batches=self.num_batches
        )
        if gives_batches(loader):
            options |= {"collate_fn": loader.collate_fn, "batch_size": None, "sampler": drawn.batches}
        else:
            options["batch_sampler"] = drawn.batches
        numbers = [len(batch) for batch in drawn.batches]
        found = self._read(dataset, loader, options, numbers) if numbers else []
        if self.num_batches is not None:
            origin = f"the {self.num_batches} batches of overfit_batches; {origin}"
        return self._sample(
            found, drawn.num_available, f"{drawn.description}; {origin}", are_exchangeable=drawn.are_exchangeable
        )

    def _batch_loader(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return a loader of the whole batches of a data set; its sampler may draw from the user's generator."""
        options: dict[str, Any] = {"batch_size": None, "collate_fn": loader.collate_fn, "generator": self._generator()}
        if not isinstance(loader.dataset, IterableDataset):
            options["sampler"] = keys_of(loader, self.seed, self.num_samples)
        return DataLoader(loader.dataset, **options)

    def _of_whole_batches(self, batches: Iterable[Any], origin: str) -> Sample:
        limited = batches if self.num_batches is None else islice(batches, self.num_batches)
        found = self._first_of((batch, self._size_of(batch, None)) for batch in limited)
        return self._sample(found, None, f"first batches; {origin}")

    def _read(
        self, dataset: Dataset[Any], loader: DataLoader[Any], options: dict[str, Any], numbers: list[int] | None
    ) -> list[tuple[Any, int]]:
        try:
            return self._first_of(self._counted(DataLoader(dataset, **options), numbers))
        except (TypeError, AttributeError):
            if loader.num_workers == 0:
                raise
            # a data set that depends on the worker, or that workers open, can be read by workers only
            workers: dict[str, Any] = {"num_workers": loader.num_workers, "worker_init_fn": loader.worker_init_fn}
            return self._first_of(self._counted(DataLoader(dataset, **options, **workers), numbers))

    def _counted(self, loader: DataLoader[Any], numbers: list[int] | None) -> Iterator[tuple[Any, int]]:
        """Read batches with their numbers of samples; ``numbers`` are the numbers of indices.

        Yields:
            Each batch and its number of samples.
        """
        for place, found in enumerate(loader):
            if not isinstance(loader.collate_fn, _Counting):
                assert numbers is not None
                yield found, self._size_of(found, numbers[place])
                continue
            batch, num_items, num_missing = found
            known = num_items if numbers is None else numbers[place]
            # data sets may return None for samples that cannot be read, and collate functions skip them
            yield batch, self._size_of(batch, known - num_missing if known == num_items else known)

    def _size_of(self, batch: Any, known: int | None) -> int:
        if self.size_fn is not None:
            return checked_size(self.size_fn, own_copy(batch), f"a {self.split} batch")
        return batch_size(batch, f"{self.split} batch") if known is None else known

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _first_of(self, batches: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Return whole batches until there are enough samples."""
        taken: list[tuple[Any, int]] = []
        num_taken = 0
        for batch, size in batches:
            taken.append((batch, size))
            num_taken += size
            self.progress.step(num_taken, self.num_samples)
            if num_taken >= self.num_samples:
                break
        return taken

    def _sample(
        self, found: list[tuple[Any, int]], available: int | None, description: str, *, are_exchangeable: bool = False
    ) -> Sample:
        there = [(batch, size) for batch, size in found if size > 0]
        if not there:
            raise ValueError(f"{self.split}: expected a data set with at least one sample, got an empty loader.")
        batches = Batches([batch for batch, _ in there], [size for _, size in there])
        return Sample(self.split, batches, batches.num_samples, available, description, are_exchangeable)


class _Counting:
    """A collate function that also returns the number of items and the number of None items."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> tuple[Any, int, int]:
        is_list = isinstance(items, (list, tuple))
        num_missing = sum(item is None for item in items) if is_list else 0
        return self._collate(items), len(items) if is_list else -1, num_missing
