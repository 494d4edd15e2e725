"""The data of an analysis: a deterministic sample of a split, drawn afresh from the data set behind its loader."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from moe_heads.callbacks.functional.batches import batch_size
from moe_heads.callbacks.trainer_access import Split, datamodule_of

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


def draw_sample(trainer: Trainer, split: Split, loaders: Any, num_samples: int, size: int, seed: int) -> Sample:
    """Draw the analysis batches of a split.

    The data set is the un-augmented one that the data module offers by a method ``analysis_dataset(split)``, else the
    one behind the trainer's loader as it is. Of a data set with a length, ``num_samples`` indices are drawn without
    repetition by a generator seeded with ``seed``, the same on every rank; of an iterable one, one that gives whole
    batches, and anything else that can be iterated, the first batches are taken. The loader's sampler plays no part: a
    distributed one would pad and split.

    A collection of training loaders gives batches of the same structure; of several validation or test loaders the
    first is taken.

    Args:
        trainer: The trainer, during or at the end of fit.
        split: "train", "val" or "test".
        loaders: The trainer's loader or loaders of the split.
        num_samples: Samples to draw of each loader; all of them when the data set has fewer.
        size: Samples a batch.
        seed: Seed of the draw.

    Returns:
        The sample.

    Raises:
        MisconfigurationException: If a loader is something that cannot be iterated.
        ValueError: If a data set is empty.
    """
    offer = getattr(datamodule_of(trainer), "analysis_dataset", None)
    # a DataLoader counts as a leaf
    leaves, structure = tree_flatten(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders)
    if offer is not None and len(leaves) == 1 and isinstance(leaves[0], DataLoader):
        return _draw(
            offer(split), leaves[0], split, num_samples, size, seed, "un-augmented data set of the data module"
        )
    origin = "data set of the loader, as it is"
    samples = [_of_loader(loader, split, num_samples, size, seed, origin) for loader in leaves]
    if split != "train" or structure.is_leaf():
        return samples[0]
    together = zip(*(sample.batches for sample in samples), strict=False)
    batches = [tree_unflatten(list(parts), structure) for parts in together]
    described = f"{len(leaves)} loaders together, each {samples[0].description}"
    return Sample(split, batches, sum(map(batch_size, batches)), None, described)


def _of_loader(loader: Any, split: Split, num_samples: int, size: int, seed: int, origin: str) -> Sample:
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        return _draw(loader.dataset, loader, split, num_samples, size, seed, origin)
    if not isinstance(loader, Iterable):
        raise MisconfigurationException(f"{split} loader: expected an iterable; got {type(loader).__name__}")
    return _checked(split, _first_batches(loader, num_samples), None, f"first batches; {origin}")


def _draw(
    dataset: Dataset[Any], loader: DataLoader[Any], split: Split, num_samples: int, size: int, seed: int, origin: str
) -> Sample:
    # a loader without a generator of its own would draw from the global one
    options: dict[str, Any] = {
        "batch_size": size,
        "collate_fn": loader.collate_fn,
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(dataset, IterableDataset):
        return _checked(
            split, _first_batches(DataLoader(dataset, **options), num_samples), None, f"first batches; {origin}"
        )
    available = len(cast(Any, dataset))
    drawn = min(num_samples, available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:drawn]
    chosen: Dataset[Any] = Subset(dataset, order.sort().values.tolist())
    batches = list(DataLoader(chosen, **options)) if drawn else []
    return _checked(split, batches, available, f"{drawn:,} of {available:,}, drawn with seed {seed}; {origin}")


def _checked(split: Split, batches: list[Any], available: int | None, description: str) -> Sample:
    if not batches:
        raise ValueError(f"{split}: expected a data set with at least one sample; got an empty loader")
    return Sample(split, batches, sum(map(batch_size, batches)), available, description)


def _first_batches(batches: Iterable[Any], num_samples: int) -> list[Any]:
    """Whole batches until ``num_samples`` are reached."""
    taken: list[Any] = []
    size = 0
    for batch in batches:
        taken.append(batch)
        size += batch_size(batch)
        if size >= num_samples:
            break
    return taken
