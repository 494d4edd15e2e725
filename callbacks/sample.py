"""The data of an analysis: a deterministic sample of a split, drawn afresh from the data set behind its loader."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from moe_heads.callbacks.functional.common.batches import batch_size
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.trainer_access import Split

__all__ = ["Sample", "draw_sample"]


@dataclass(frozen=True)
class Sample:
    """Batches of an analysis and where they come from.

    Attributes:
        split: "train", "val" or "test".
        batches: The batches, as the collate function gave them (on the CPU).
        num_samples: Samples in them.
        num_available: Samples in the whole split; None for an iterable data set.
        description: How they were drawn, for the report.
    """

    split: Split
    batches: Sequence[Any]
    num_samples: int
    num_available: int | None
    description: str


def draw_sample(
    split: Split,
    loaders: Any,
    num_samples: int,
    size: int,
    seed: int,
    *,
    dataset: Any | None = None,
    num_batches: int | None = None,
    monitor: Monitor | None = None,
) -> Sample:
    """Draw the analysis batches of a split.

    Of a data set with a length, ``num_samples`` indices are drawn without repetition by a generator seeded with
    ``seed``; of an iterable one, one that gives whole batches, and anything else that can be iterated, the first
    batches are taken. The loader's sampler plays no part: a distributed one would pad and split.

    A collection of training loaders gives batches of the same structure; of several validation or test loaders the
    first is taken.

    Args:
        split: "train", "val" or "test".
        loaders: The trainer's loader or loaders of the split.
        num_samples: Samples to draw of each loader; all of them when the data set has fewer.
        size: Samples a batch.
        seed: Seed of the draw.
        dataset: The un-augmented data set, where one is offered; by default the one behind the loader, as it is.
        num_batches: Draw from this many first batches of the loader only (``overfit_batches``).
        monitor: Told of each batch.

    Returns:
        The sample.

    Raises:
        MisconfigurationException: If a loader is something that cannot be iterated again and again.
        ValueError: If a data set is empty.
    """
    draw = _Draw(split, num_samples, size, seed, num_batches, monitor or Monitor())
    # a DataLoader counts as a leaf
    leaves, structure = tree_flatten(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders)
    if dataset is not None and len(leaves) == 1 and isinstance(leaves[0], DataLoader):
        return draw.of_dataset(dataset, leaves[0], "un-augmented data set of the data module")
    samples = [draw.of_loader(loader) for loader in leaves]
    if split != "train" or structure.is_leaf():
        return samples[0]
    together = zip(*(sample.batches for sample in samples), strict=False)
    batches = [tree_unflatten(list(parts), structure) for parts in together]
    described = f"{len(leaves)} loaders together, each {samples[0].description}"
    return Sample(split, batches, sum(map(batch_size, batches)), None, described)


@dataclass(frozen=True)
class _Draw:
    """The options of a draw."""

    split: Split
    num_samples: int
    size: int
    seed: int
    num_batches: int | None
    monitor: Monitor

    def of_loader(self, loader: Any) -> Sample:
        origin = "data set of the loader, as it is"
        if isinstance(loader, DataLoader):
            if loader.batch_sampler is not None:
                return self.of_dataset(loader.dataset, loader, origin)
            # one that gives whole batches: without its sampler, which may draw from a generator of the user's
            loader = DataLoader(
                loader.dataset, batch_size=None, collate_fn=loader.collate_fn, generator=self._generator()
            )
        if not isinstance(loader, Iterable):
            raise MisconfigurationException(f"{self.split} loader: expected an iterable; got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            # reading it would take batches away from the training
            raise MisconfigurationException(
                f"{self.split} loader: expected something that can be iterated again and again; got the one-way"
                f" iterator {type(loader).__name__}. Give the Trainer a DataLoader, or an object whose __iter__ starts"
                " anew."
            )
        batches = loader if self.num_batches is None else islice(loader, self.num_batches)
        return self._sample(self._first_of(batches), None, f"first batches; {origin}")

    def of_dataset(self, dataset: Dataset[Any], loader: DataLoader[Any], origin: str) -> Sample:
        # a loader without a generator of its own would draw from the global one
        options: dict[str, Any] = {
            "batch_size": self.size,
            "collate_fn": loader.collate_fn,
            "generator": self._generator(),
        }
        if isinstance(dataset, IterableDataset):
            return self._sample(self._read(dataset, loader, options), None, f"first batches; {origin}")
        population = range(len(cast(Any, dataset))) if dataset is not loader.dataset else _population(loader)
        if self.num_batches is not None:
            population = population[: self.num_batches * (loader.batch_size or 1)]
            origin = f"the {self.num_batches} batches of overfit_batches; {origin}"
        available = len(population)
        drawn = min(self.num_samples, available)
        order = torch.randperm(available, generator=self._generator())[:drawn]
        chosen: Dataset[Any] = Subset(dataset, [population[place] for place in order.sort().values.tolist()])
        batches = self._read(chosen, loader, options) if drawn else []
        return self._sample(batches, available, f"{drawn:,} of {available:,}, drawn with seed {self.seed}; {origin}")

    def _read(self, dataset: Dataset[Any], loader: DataLoader[Any], options: dict[str, Any]) -> list[Any]:
        try:
            return self._first_of(DataLoader(dataset, **options))
        except (TypeError, AttributeError):
            if loader.num_workers == 0:
                raise
            # a data set that asks which worker it is in, or that workers open, can be read by workers only
            workers: dict[str, Any] = {"num_workers": loader.num_workers, "worker_init_fn": loader.worker_init_fn}
            return self._first_of(DataLoader(dataset, **options, **workers))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _first_of(self, batches: Iterable[Any]) -> list[Any]:
        """Whole batches until there are enough samples."""
        taken: list[Any] = []
        size = 0
        for batch in batches:
            taken.append(batch)
            size += batch_size(batch)
            self.monitor.step(size, self.num_samples)
            if size >= self.num_samples:
                break
        return taken

    def _sample(self, batches: list[Any], available: int | None, description: str) -> Sample:
        if not batches:
            raise ValueError(f"{self.split}: expected a data set with at least one sample; got an empty loader")
        return Sample(self.split, batches, sum(map(batch_size, batches)), available, description)


def _population(loader: DataLoader[Any]) -> Sequence[Any]:
    """Indices of the samples that a loader can give: a sampler over a subset keeps training and validation apart."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # under DDP Lightning wraps a sampler into a distributed one
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    indices = getattr(sampler, "indices", None)
    if isinstance(indices, Tensor):
        return indices.tolist()
    return list(indices) if isinstance(indices, Iterable) else range(len(cast(Any, loader.dataset)))
