"""The indices at which an analysis reads the data set behind a loader: drawn by a seed, as the samplers have it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from moe_heads.analysis._shared.contents import remember
from moe_heads.analysis._shared.generators import generators_kept, seed_generators

__all__ = ["IndexBatches", "draw_index_batches", "gives_batches", "keys_of"]

# Samplers that give every sample of the data set alike; those of subclasses with an order of their own do not.
_OF_ALL = {sampler.__iter__ for sampler in (SequentialSampler, RandomSampler, DistributedSampler)}


@dataclass(frozen=True)
class IndexBatches:
    """Indices of the analysis batches.

    Attributes:
        batches: Indices, or any other keys, of each batch.
        num_available: Samples that they are drawn from.
        description: How they were drawn.
        are_exchangeable: Whether every batch is a random sample of all that was drawn.
    """

    batches: list[list[Any]]
    num_available: int
    description: str
    are_exchangeable: bool


def draw_index_batches(
    loader: DataLoader[Any], num_samples: int, size: int, seed: int, *, dataset: Any, num_batches: int | None = None
) -> IndexBatches:
    """Draw the indices of the analysis batches by a seed.

    A sampler of the loader that draws with weights, gives the indices of a subset, gives other keys than numbers or
    makes batches of its own (buckets, say) is respected. It is left as it was, with its generators.

    Args:
        loader: The loader.
        num_samples: Samples to draw; whole batches of a batch sampler may hold some more.
        size: Samples a batch; a batch sampler has its own.
        seed: Seed of the draw.
        dataset: The data set to be read. The samplers count if it is that of the loader, or of the same length.
        num_batches: Draw from this many first batches of the loader only.
    """
    generator = torch.Generator().manual_seed(seed)
    is_same = dataset is loader.dataset or len(dataset) == len(loader.dataset)  # type: ignore[arg-type]
    sampler, own = _sampler_of(loader), _own_batches_of(loader)
    if not is_same:
        left_out = type(own).__name__ if own is not None else _name_of_special(sampler)
        note = f" (without the loader's {left_out}, which is over another data set)" if left_out else ""
        return _chunks(range(len(dataset)), num_samples, size, seed, generator, note)
    if own is not None:
        batches = [_listed(batch) for batch in _read(own, loader, seed, num_samples, of_batches=True)][:num_batches]
        return _whole_batches(batches, num_samples, seed, generator, type(own).__name__)
    limit = None if num_batches is None else num_batches * (loader.batch_size or 1)
    if isinstance(sampler, WeightedRandomSampler) and limit is None:
        return _weighted(sampler, num_samples, size, seed, generator)
    name = _name_of_special(sampler)
    note = f" of those that the loader's {name} gives" if name else ""
    return _chunks(keys_of(loader, seed, num_samples)[:limit], num_samples, size, seed, generator, note)


def keys_of(loader: DataLoader[Any], seed: int, num_samples: int) -> Sequence[Any]:
    """The indices, or other keys, that a loader's sampler gives in an epoch, in its order."""
    sampler = _sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        # a sampler over a subset keeps training and validation apart
        return _listed(sampler.indices)
    if getattr(type(sampler), "__iter__", None) in _OF_ALL:
        return range(len(loader.dataset))  # type: ignore[arg-type]
    return _listed(_read(sampler, loader, seed, num_samples, of_batches=False))


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether a loader without a batch size asks its data set for whole batches of indices."""
    sampler = loader.sampler
    is_list = isinstance(sampler, (list, tuple)) and bool(sampler) and isinstance(sampler[0], (list, tuple))
    return loader.batch_sampler is None and (is_list or isinstance(sampler, BatchSampler))


def _own_batches_of(loader: DataLoader[Any]) -> Any | None:
    """What makes the batches of a loader, if that is not torch's plain batch sampler."""
    batches = loader.sampler if gives_batches(loader) else loader.batch_sampler
    is_plain = batches is None or getattr(type(batches), "__iter__", None) is BatchSampler.__iter__
    return None if is_plain else batches


def _sampler_of(loader: DataLoader[Any]) -> Any:
    batches = loader.sampler if gives_batches(loader) else loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    # under DDP Lightning wraps a sampler into a distributed one
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def _name_of_special(sampler: Any) -> str:
    """Name of a sampler that does not give every sample alike; "" for another one."""
    is_common = getattr(type(sampler), "__iter__", None) in _OF_ALL or isinstance(sampler, SubsetRandomSampler)
    return "" if is_common else type(sampler).__name__


def _chunks(
    keys: Sequence[Any], num_samples: int, size: int, seed: int, generator: torch.Generator, note: str
) -> IndexBatches:
    """Batches of samples drawn without repetition, in random order, so that each batch is a random sample too."""
    num_drawn = min(num_samples, len(keys))
    drawn = [keys[place] for place in torch.randperm(len(keys), generator=generator)[:num_drawn].tolist()]
    described = f"{num_drawn:,} of {len(keys):,}{note}, drawn with seed {seed}"
    return IndexBatches(_cut(drawn, size), len(keys), described, are_exchangeable=True)


def _weighted(
    sampler: WeightedRandomSampler, num_samples: int, size: int, seed: int, generator: torch.Generator
) -> IndexBatches:
    weights = torch.as_tensor(sampler.weights, dtype=torch.float64)
    num_drawn = min(num_samples, sampler.num_samples)
    drawn = torch.multinomial(weights, num_drawn, sampler.replacement, generator=generator).tolist()
    how = "with" if sampler.replacement else "without"
    described = (
        f"{num_drawn:,} drawn from {len(weights):,} with the weights of the loader's {type(sampler).__name__}, {how}"
        f" replacement, with seed {seed}"
    )
    return IndexBatches(_cut(drawn, size), len(weights), described, are_exchangeable=True)


def _whole_batches(
    batches: list[list[Any]], num_samples: int, seed: int, generator: torch.Generator, name: str
) -> IndexBatches:
    """Batches as they are, chosen at random until there are enough samples."""
    chosen: list[list[Any]] = []
    for place in torch.randperm(len(batches), generator=generator).tolist():
        if sum(map(len, chosen)) >= num_samples:
            break
        chosen.append(batches[place])
    num_available = sum(map(len, batches))
    described = (
        f"{sum(map(len, chosen)):,} of {num_available:,}, in {len(chosen)} of the {len(batches)} batches that the"
        f" loader's {name} makes, drawn with seed {seed}"
    )
    return IndexBatches([batch for batch in chosen if batch], num_available, described, are_exchangeable=False)


def _read(source: Any, loader: DataLoader[Any], seed: int, num_samples: int, *, of_batches: bool) -> list[Any]:
    """One epoch of a sampler; of an endless one as much as there are samples."""
    with _left_as_it_was(source, loader, seed):
        try:
            return list(islice(source, len(source)))
        except (TypeError, NotImplementedError):
            pass
        enough = max(num_samples, len(loader.dataset))  # type: ignore[arg-type]
        taken: list[Any] = []
        num_taken = 0
        for entry in source:
            taken.append(entry)
            num_taken += len(entry) if of_batches else 1
            if num_taken >= enough:
                break
        return taken


@contextmanager
def _left_as_it_was(source: Any, loader: DataLoader[Any], seed: int) -> Iterator[None]:
    """Seed the global generators, and put these and all that samplers hold back when the block ends."""
    known = {id(loader.dataset)}
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        for sampler in _samplers_in(source):
            stack.callback(remember(vars(sampler), known=known))
        seed_generators(seed)
        yield


def _samplers_in(source: Any) -> list[Any]:
    """A sampler and those that it draws from."""
    found: list[Any] = []
    waiting = [source]
    while waiting:
        sampler = waiting.pop()
        if hasattr(sampler, "__dict__") and not any(sampler is other for other in found):
            found.append(sampler)
            waiting += [value for value in vars(sampler).values() if isinstance(value, Sampler)]
    return found


def _listed(keys: Iterable[Any]) -> list[Any]:
    return keys.tolist() if isinstance(keys, Tensor) else list(keys)


def _cut(drawn: list[Any], size: int) -> list[list[Any]]:
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]
