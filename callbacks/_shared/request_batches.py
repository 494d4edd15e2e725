"""Batches of any size as a server gets them: each is collated from samples of its own."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis.inference_timing.shapes import forms_of
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.loader_indices import draw_index_batches
from moe_heads.callbacks._shared.trainer_access import Split, uncombined

__all__ = ["RequestBatches", "request_batches"]

# larger batches repeat these samples
_MOST_SAMPLES = 1024
# samples of one shape are repeated earlier where repetition does not change the time
_MOST_ALIKE = 256


class RequestBatches:
    """Function from a size to a batch of the next samples, collated as by the loader, on the device of the analysis.

    Args:
        context: Context of the analysis.
        loader: Loader whose collate function is used.
        samples: The samples, in the order in which they are used. They are read as they are needed.
        origin: Description of the samples.
        may_repeat: Whether samples of one shape may be repeated early.

    Attributes:
        origin: Description of the batches.
    """

    def __init__(
        self, context: ExecutionContext, loader: DataLoader[Any], samples: Iterable[Any], origin: str, may_repeat: bool
    ) -> None:
        self._context, self._collate = context, loader.collate_fn
        self._unread, self._read = iter(samples), list[Any]()
        self._forms: set[Any] = set()
        self._next, self._may_repeat = 0, may_repeat
        self.origin = f"each collated from samples of its own, of {origin}"

    def __call__(self, size: int) -> Batch:
        """Return a batch of the next ``size`` samples. After the last sample, the first follows."""
        # the collate function may change its samples
        return self._context.transfer(self._collate([own_copy(self._take()) for _ in range(size)]))

    def _take(self) -> Any:
        is_enough = self._may_repeat and len(self._forms) <= 1 and len(self._read) >= _MOST_ALIKE
        if self._next >= len(self._read) and not is_enough:
            for sample in self._unread:
                # data sets may return None for samples that cannot be read
                if sample is not None:
                    self._forms.add(forms_of(sample, -1))
                    self._read.append(sample)
                    break
        if not self._read:
            raise ValueError("expected a data set with at least one sample, got none")
        sample = self._read[self._next % len(self._read)]
        self._next = self._next % len(self._read) + 1
        return sample


def request_batches(
    context: ExecutionContext, split: Split, seed: int, *, may_repeat: bool
) -> tuple[RequestBatches | None, str]:
    """Return the function that collates batches of any size from the data of a split.

    Samples of a data set with a length are drawn with a seed, according to the sampler of the loader. A batch sampler
    of another class than torch's keeps its order, so that consecutive samples are those of its batches. An iterable
    data set gives its first samples.

    Args:
        context: Context of the analysis.
        split: The split.
        seed: Seed of the draw.
        may_repeat: Whether samples of one shape may be repeated early: the time does not depend on their values.

    Returns:
        The function, or None and the reason: the data are batches already.
    """
    leaves, _ = tree_flatten(uncombined(context.loader_of(split)))
    loader = leaves[0]
    if split == "train" and len(leaves) > 1:
        return None, "several training loaders are combined"
    if not isinstance(loader, DataLoader):
        return None, "the data are batches and no DataLoader"
    if loader.batch_size is None and loader.batch_sampler is None:
        return None, "the data set returns whole batches"
    num_samples, num_batches = context.limits(split, _MOST_SAMPLES)
    if isinstance(loader.dataset, IterableDataset):
        if isinstance(loader.dataset, Iterator):
            return None, "the data set can be read once only"
        samples = islice(_read(loader.dataset, loader), num_samples)
        return RequestBatches(context, loader, samples, "the first ones of an iterable data set", may_repeat), ""
    own = context.dataset(split) if num_batches is None and len(leaves) == 1 else None
    dataset: Any = loader.dataset if own is None else own
    drawn = draw_index_batches(loader, num_samples, 1, seed, dataset=dataset, num_batches=num_batches)
    keys = [key for batch in drawn.batches for key in batch][:num_samples]
    return RequestBatches(context, loader, _read(dataset, loader, sampler=keys), drawn.description, may_repeat), ""


def _read(dataset: Any, loader: DataLoader[Any], **options: Any) -> Iterator[Any]:
    """Read samples one by one, in a worker if the data set can be read by workers only.

    Yields:
        The samples.
    """
    # a loader without its own generator would draw from the global one
    options |= {"batch_size": None, "collate_fn": _same, "generator": torch.Generator().manual_seed(0)}
    try:
        samples = iter(DataLoader(dataset, **options))
        first = next(samples, None)
    except (TypeError, AttributeError):
        if loader.num_workers == 0:
            raise
        samples = iter(DataLoader(dataset, **options, num_workers=1, worker_init_fn=loader.worker_init_fn))
        first = next(samples, None)
    yield first
    yield from samples


def _same(sample: Any) -> Any:
    return sample
