"""The data of an analysis: a deterministic sample of a split, drawn afresh from the data set behind its loader."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader, Dataset, IterableDataset

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.counting import BatchSizeFn, batch_size, checked_size
from moe_heads.analysis._shared.progress import Progress
from moe_heads.callbacks._shared.combined_sample import Part, combined
from moe_heads.callbacks._shared.loader_indices import draw_index_batches, gives_batches, keys_of
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["Sample", "draw_sample"]


@dataclass(frozen=True)
class Sample:
    """Batches of an analysis and where they come from.

    Attributes:
        split: "train", "val" or "test".
        batches: The batches, as the collate function gave them (on the CPU), with their numbers of samples.
        num_samples: Samples in them.
        num_available: Samples in the whole split; None where that is not known.
        description: How they were drawn, for the report.
        are_exchangeable: Whether every batch is a random sample of the draw, so that a spread over the batches says
            something; False for the batches of a stream, of a batch sampler, or of several loaders.
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

    Of a data set with a length, ``num_samples`` indices are drawn without repetition by a generator seeded with
    ``seed``, and put into batches in random order; see `draw_index_batches` for the samplers that are respected. Of
    an iterable data set, one that gives whole batches, and anything else that can be iterated, the first batches are
    taken.

    A collection of training loaders gives batches of the same structure, combined as Lightning does; of several
    validation or test loaders the first is taken.

    Args:
        split: "train", "val" or "test".
        loaders: The trainer's loader or loaders of the split.
        num_samples: Samples to draw of each loader; all of them when the data set has fewer.
        size: Samples a batch.
        seed: Seed of the draw.
        dataset: The un-augmented data set, where one is offered; by default the one behind the loader, as it is.
        num_batches: Draw from this many first batches of the loader only (``overfit_batches``).
        progress: Told of each batch.
        is_size_default: Whether ``size`` is nobody's wish: the batches are then no larger than those of the loader, and
            those of several loaders as large as in the training.
        batch_size_fn: Number of samples of a batch; by default the number of indices that it was made of.

    Returns:
        The sample.

    Raises:
        MisconfigurationException: If a loader is something that cannot be iterated again and again.
        ValueError: If a data set is empty.
    """
    draw = _Draw(split, num_samples, size, seed, num_batches, progress or Progress(), is_size_default, batch_size_fn)
    # a DataLoader counts as a leaf
    paths, structure = tree_flatten_with_path(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders)
    leaves = [leaf for _, leaf in paths]
    if dataset is not None and len(leaves) == 1 and isinstance(leaves[0], DataLoader):
        return draw.of_dataset(dataset, leaves[0], "un-augmented data set of the data module")
    if structure.is_leaf():
        return draw.of_loader(leaves[0])
    if split != "train":
        first = draw.of_loader(leaves[0])
        others = f"; the other {len(leaves) - 1} of {len(leaves)} loaders are left out" if len(leaves) > 1 else ""
        return replace(first, description=first.description + others)
    mode = loaders._mode if isinstance(loaders, CombinedLoader) else "max_size_cycle"
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
    """The options of a draw."""

    split: Split
    num_samples: int
    size: int
    seed: int
    num_batches: int | None
    progress: Progress
    is_size_default: bool
    size_fn: BatchSizeFn | None

    def sizes_in_proportion(self, loaders: list[Any]) -> list[int]:
        """Batch sizes of several loaders: their own, scaled so that the largest is the size that was asked for."""
        own = [getattr(loader, "batch_size", None) for loader in loaders]
        known = [size for size in own if isinstance(size, int)]
        largest = max(known, default=self.size)
        scale = 1.0 if self.is_size_default else self.size / largest
        return [max(1, round(scale * size)) if isinstance(size, int) else self.size for size in own]

    def of_loader(self, loader: Any) -> Sample:
        origin = "data set of the loader, as it is"
        if isinstance(loader, DataLoader):
            if loader.batch_sampler is not None or gives_batches(loader):
                return self.of_dataset(loader.dataset, loader, origin)
            return self._of_whole_batches(self._batch_loader(loader), origin)
        if not isinstance(loader, Iterable):
            raise MisconfigurationException(f"{self.split} loader: expected an iterable, got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            # reading it would take batches away from the training
            raise MisconfigurationException(
                f"{self.split} loader: expected something that can be iterated again and again, got the one-way"
                f" iterator {type(loader).__name__}. Give the Trainer a DataLoader, or an object whose __iter__ starts"
                " anew."
            )
        return self._of_whole_batches(loader, origin)

    def of_dataset(self, dataset: Dataset[Any], loader: DataLoader[Any], origin: str) -> Sample:
        size = min(self.size, loader.batch_size or self.size) if self.is_size_default else self.size
        # a loader without a generator of its own would draw from the global one
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
        """A loader of the whole batches that a data set gives; its sampler may draw from a generator of the user's."""
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
            # a data set that asks which worker it is in, or that workers open, can be read by workers only
            workers: dict[str, Any] = {"num_workers": loader.num_workers, "worker_init_fn": loader.worker_init_fn}
            return self._first_of(self._counted(DataLoader(dataset, **options, **workers), numbers))

    def _counted(self, loader: DataLoader[Any], numbers: list[int] | None) -> Iterator[tuple[Any, int]]:
        """Read batches with their numbers of samples; ``numbers`` are those of the indices.

        Yields:
            Each batch, and its number of samples.
        """
        for place, found in enumerate(loader):
            if not isinstance(loader.collate_fn, _Counting):
                assert numbers is not None
                yield found, self._size_of(found, numbers[place])
                continue
            batch, num_items, num_missing = found
            known = num_items if numbers is None else numbers[place]
            # a collate function that leaves out what could not be read gets None in its place
            yield batch, self._size_of(batch, known - num_missing if known == num_items else known)

    def _size_of(self, batch: Any, known: int | None) -> int:
        if self.size_fn is not None:
            return checked_size(self.size_fn, own_copy(batch), f"a {self.split} batch")
        return batch_size(batch, f"{self.split} batch") if known is None else known

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _first_of(self, batches: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Whole batches until there are enough samples."""
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
            raise ValueError(f"{self.split}: expected a data set with at least one sample, got an empty loader")
        batches = Batches([batch for batch, _ in there], [size for _, size in there])
        return Sample(self.split, batches, batches.num_samples, available, description, are_exchangeable)


class _Counting:
    """A collate function that also says how many items it was given, and how many of them are None."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> tuple[Any, int, int]:
        is_list = isinstance(items, (list, tuple))
        num_missing = sum(item is None for item in items) if is_list else 0
        return self._collate(items), len(items) if is_list else -1, num_missing
