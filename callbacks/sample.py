"""The data of an analysis: a deterministic sample of a split, drawn afresh from the data set behind its loader."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from moe_heads.callbacks.functional.batches import batch_size
from moe_heads.callbacks.trainer_access import Split, loader_of

__all__ = ["Sample", "available_split", "draw_sample"]


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


def available_split(trainer: Trainer, split: Split) -> Split | None:
    """The split itself, "val" in place of a missing "test", None where there is no data."""
    if loader_of(trainer, split) is not None:
        return split
    return available_split(trainer, "val") if split == "test" else None


def draw_sample(trainer: Trainer, split: Split, num_samples: int, size: int, seed: int) -> Sample:
    """Draw the analysis batches of a split.

    The data set is the un-augmented one that the data module offers by a method ``analysis_dataset(split)``, else the
    one behind the trainer's loader as it is. Of a data set with a length, ``num_samples`` indices are drawn without
    repetition by a generator seeded with ``seed``, the same on every rank; of an iterable one the first ``num_samples``
    are taken. The loader's sampler plays no part: a distributed one would pad and split.

    Args:
        trainer: The trainer, during or at the end of fit.
        split: "train", "val" or "test".
        num_samples: Samples to draw; all of them when the data set has fewer.
        size: Samples a batch.
        seed: Seed of the draw.

    Returns:
        The sample.

    Raises:
        MisconfigurationException: If the loader is something else than a `DataLoader`.
        ValueError: If the data set is empty.
    """
    loader = _first_loader(loader_of(trainer, split), split)
    dataset, origin = loader.dataset, "data set of the loader, as it is"
    offer = getattr(getattr(trainer, "datamodule", None), "analysis_dataset", None)
    if offer is not None:
        dataset, origin = offer(split), "un-augmented data set of the data module"
    # a loader without a generator of its own would draw from the global one
    options: dict[str, Any] = {
        "batch_size": size,
        "collate_fn": loader.collate_fn,
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(dataset, IterableDataset):
        batches = _first_batches(DataLoader(dataset, **options), num_samples)
        drawn, available = sum(map(batch_size, batches)), None
        how = f"first {drawn}"
    else:
        available = len(cast(Any, dataset))
        drawn = min(num_samples, available)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:drawn]
        chosen: Dataset[Any] = Subset(dataset, order.sort().values.tolist())
        batches = list(DataLoader(chosen, **options)) if drawn else []
        how = f"{drawn:,} of {available:,}, drawn with seed {seed}"
    if not drawn:
        raise ValueError(f"{split}: expected a data set with at least one sample; got an empty loader")
    return Sample(split, batches, drawn, available, f"{how}; {origin}")


def _first_loader(loaders: Any, split: str) -> DataLoader[Any]:
    """The loader, or the first of a list, tuple, dict or combined loader."""
    while not isinstance(loaders, DataLoader):
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.iterables
        elif isinstance(loaders, dict) and loaders:
            loaders = next(iter(loaders.values()))
        elif isinstance(loaders, (list, tuple)) and loaders:
            loaders = loaders[0]
        else:
            raise MisconfigurationException(
                f"{split} loader: expected a torch DataLoader (or a collection of them); got {type(loaders).__name__}"
            )
    return loaders


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
