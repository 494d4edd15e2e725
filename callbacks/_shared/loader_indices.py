"""Indices of the samples that an analysis reads, drawn with a seed and according to the samplers of the loader."""

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

from moe_heads.analysis._shared.generators import generators_kept, seed_generators
from moe_heads.analysis._shared.state import snapshot
from moe_heads.callbacks._shared.trainer_access import inner_sampler

__all__ = ["IndexBatches", "draw_index_batches", "gives_batches", "keys_of"]

# Samplers with equal weight for every sample. Subclasses that override the order are not included.
_OF_ALL = {sampler.__iter__ for sampler in (SequentialSampler, RandomSampler, DistributedSampler)}


@dataclass(frozen=True)
class IndexBatches:
    """Indices of the analysis batches.

    Attributes:
        batches: Indices or other keys of each batch.
        num_available: Number of samples that they are drawn from.
        description: Description of the draw.
        are_exchangeable: Whether every batch is a random subset of the drawn samples.
    """

    batches: list[list[Any]]
    num_available: int
    description: str
    are_exchangeable: bool


def draw_index_batches(
    loader: DataLoader[Any], num_samples: int, size: int, seed: int, *, dataset: Any, num_batches: int | None = None
) -> IndexBatches:
    """Draw the indices of the analysis batches with a seed.

    The draw respects samplers that use weights, select a subset, return keys other than integers, or form their own
    batches (for example buckets). The state of the samplers and their generators is restored.

    Args:
        loader: The loader.
        num_samples: Number of samples to draw; whole batches of a batch sampler may hold slightly more.
        size: Samples in a batch; a batch sampler has its own.
        seed: Seed of the draw.
        dataset: The data set to read. The samplers are used if it is that of the loader, or has the same length.
        num_batches: Draw only from this many first batches of the loader.
    """
    generator = torch.Generator().manual_seed(seed)
    is_same = dataset is loader.dataset or len(dataset) == len(loader.dataset)  # type: ignore[arg-type]
    sampler, own = _sampler_of(loader), _own_batches_of(loader)
    if not is_same:
        left_out = type(own).__name__ if own is not None else _name_of_special(sampler)
        note = f" (without the loader's {left_out}, which belongs to another data set)" if left_out else ""
        return _chunks(range(len(dataset)), num_samples, size, seed, generator, note)
    if own is not None:
        batches = [_listed(batch) for batch in _read(own, loader, seed, num_samples, of_batches=True)][:num_batches]
        return _whole_batches(batches, num_samples, seed, generator, type(own).__name__)
    limit = None if num_batches is None else num_batches * (loader.batch_size or 1)
    if isinstance(sampler, WeightedRandomSampler) and limit is None:
        return _weighted(sampler, num_samples, size, seed, generator)
    name = _name_of_special(sampler)
    note = f" of those that the loader's {name} returns" if name else ""
    return _chunks(keys_of(loader, seed, num_samples)[:limit], num_samples, size, seed, generator, note)


def keys_of(loader: DataLoader[Any], seed: int, num_samples: int) -> Sequence[Any]:
    """Return the indices or other keys of one epoch of a loader's sampler, in its order."""
    sampler = _sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        # a sampler over a subset separates training and validation samples
        return _listed(sampler.indices)
    if getattr(type(sampler), "__iter__", None) in _OF_ALL:
        return range(len(loader.dataset))  # type: ignore[arg-type]
    return _listed(_read(sampler, loader, seed, num_samples, of_batches=False))


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Return whether a loader without a batch size passes whole batches of indices to its data set."""
    sampler = loader.sampler
    is_list = isinstance(sampler, (list, tuple)) and bool(sampler) and isinstance(sampler[0], (list, tuple))
    return loader.batch_sampler is None and (is_list or isinstance(sampler, BatchSampler))


def _own_batches_of(loader: DataLoader[Any]) -> Any | None:
    """Return the batch sampler of a loader unless it is torch's plain one."""
    batches = loader.sampler if gives_batches(loader) else loader.batch_sampler
    is_plain = batches is None or getattr(type(batches), "__iter__", None) is BatchSampler.__iter__
    return None if is_plain else batches


def _sampler_of(loader: DataLoader[Any]) -> Any:
    batches = loader.sampler if gives_batches(loader) else loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    return inner_sampler(sampler)


def _name_of_special(sampler: Any) -> str:
    """Return the name of a sampler without equal weight for every sample, "" for others."""
    is_common = getattr(type(sampler), "__iter__", None) in _OF_ALL or isinstance(sampler, SubsetRandomSampler)
    return "" if is_common else type(sampler).__name__


def _chunks(
    keys: Sequence[Any], num_samples: int, size: int, seed: int, generator: torch.Generator, note: str
) -> IndexBatches:
    """Draw samples without repetition in random order, so that each batch is a random subset too."""
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
    """Choose whole batches at random until there are enough samples."""
    chosen: list[list[Any]] = []
    for place in torch.randperm(len(batches), generator=generator).tolist():
        if sum(map(len, chosen)) >= num_samples:
            break
        chosen.append(batches[place])
    num_available = sum(map(len, batches))
    described = (
        f"{sum(map(len, chosen)):,} of {num_available:,}, in {len(chosen)} of the {len(batches)} batches that the"
        f" loader's {name} forms, drawn with seed {seed}"
    )
    return IndexBatches([batch for batch in chosen if batch], num_available, described, are_exchangeable=False)


def _read(source: Any, loader: DataLoader[Any], seed: int, num_samples: int, *, of_batches: bool) -> list[Any]:
    """Read one epoch of a sampler, or as many keys as there are samples if it is endless."""
    with _samplers_preserved(source, loader, seed):
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
def _samplers_preserved(source: Any, loader: DataLoader[Any], seed: int) -> Iterator[None]:
    """Seed the global generators, and restore them and the state of the samplers when the block ends."""
    known = {id(loader.dataset)}
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        for sampler in _samplers_in(source):
            stack.callback(snapshot(vars(sampler), known=known))
        seed_generators(seed)
        yield


def _samplers_in(source: Any) -> list[Any]:
    """Return a sampler and the samplers that it draws from."""
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
