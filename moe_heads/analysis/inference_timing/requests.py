"""Batches of a timing as a server gets them: of each size, without labels, several draws where the time may differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn, is_movable_object, to_device
from moe_heads.analysis._shared.generators import generators_kept, seed_generators
from moe_heads.analysis.inference_timing.entries import RequestEntries, request_entries
from moe_heads.analysis.inference_timing.resizing import check_resizable, num_samples, resized
from moe_heads.analysis.inference_timing.shapes import forms_of, shapes_of
from moe_heads.routing import Router
from moe_heads.routing.recognition.recognized import recognized_routers

__all__ = ["BatchFn", "RequestReport", "Requests", "chooses_experts", "is_batch_fn", "requests_of"]

BatchFn = Callable[[int], Batch]
"""``example_batch(size) -> batch``: at each call another batch of ``size`` samples."""

_DRAWS = 5
# the draws of a size together hold no more samples than this, unless two do
_MOST_SAMPLES = 1024
# up to this size it costs little to draw several batches, which shows if shapes differ
_SMALL = 32
_ONE = "one, because all samples have the same shape, and no router chooses experts"


@dataclass(frozen=True)
class RequestReport:
    """Inputs that were timed.

    Attributes:
        entries: Entries of a batch that the forward pass got, and those that stayed out, with the reason.
        left_out: Reasons for the entries that stayed out, by name.
        origin: Origin of the batches.
        why_draws: Reason for the number of draws.
        shapes: Shapes of each draw, by batch size.
    """

    entries: str
    left_out: Mapping[str, str]
    origin: str
    why_draws: str
    shapes: Mapping[int, tuple[str, ...]]


class _Source(Protocol):
    """Source of the batches of each size."""

    origin: str
    entries: RequestEntries

    def first(self, size: int) -> Batch:
        """Return the first batch of a size. ``entries`` are unknown yet."""

    def draws(self, size: int) -> list[Batch]:
        """Return the batches of a size."""

    @property
    def why_draws(self) -> str:
        """Reason for the number of draws."""


@dataclass
class Requests:
    """Batches of each size on a device, with the entries that the forward pass gets."""

    source: _Source
    entries: RequestEntries
    device: torch.device
    _shapes: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def draws(self, size: int) -> list[Batch]:
        """Return the batches of a size."""
        batches = [to_device(self.entries.of(batch), self.device) for batch in self.source.draws(size)]
        self._shapes[size] = tuple(map(shapes_of, batches))
        return batches

    def report(self) -> RequestReport:
        """Return the inputs of the sizes so far."""
        entries, source = self.entries, self.source
        return RequestReport(entries.text, entries.left_out, source.origin, source.why_draws, dict(self._shapes))


def requests_of(
    model: nn.Module,
    example: Batch | BatchFn,
    sizes: Sequence[int],
    forward_fn: ForwardFn,
    *,
    num_draws: int | None,
    seed: int,
    device: torch.device,
) -> Requests:
    """Find the source of the batches and the entries of a request, and draw the batches of the smallest size.

    Raises:
        ValueError: If the example is empty or cannot be cut to a size, if the function that draws raises an error or
            returns batches of another size, or if the model gives no output without its labels.
    """
    has_router, first = chooses_experts(model), min(sizes)
    source: _Source
    if is_batch_fn(example):
        source = _DrawnBatches(example, seed, num_draws, has_router)
    else:
        source = _ExampleRows(example, sizes, num_draws, has_router)
    example = source.first(first)
    entries = request_entries(model, to_device(example, device), forward_fn)
    source.entries = entries
    return Requests(source, entries, device)


def is_batch_fn(example: Any) -> bool:
    """Return whether an example batch is a function of the size. Some batch objects can be called too."""
    return (
        callable(example) and not isinstance(example, (Tensor, nn.Module, Mapping)) and not is_movable_object(example)
    )


def chooses_experts(model: nn.Module) -> bool:
    """Return whether a model has a router that chooses experts, so that its time depends on the samples."""
    own = any(isinstance(module, Router) and module.k is not None for module in model.modules())
    return own or bool(recognized_routers(model, set()))


class _ExampleRows:
    """Draws from the rows of one example, without a common row. There are only as many as fit into it."""

    def __init__(self, example: Batch, sizes: Sequence[int], num_draws: int | None, has_router: bool) -> None:
        self._example, self._num_samples = example, num_samples(example)
        if self._num_samples == 0:
            raise ValueError("example_batch: expected at least one sample, got none.")
        if any(size != self._num_samples for size in sizes):
            check_resizable(example)
        self.entries: RequestEntries
        self._wanted = num_draws or (_DRAWS if has_router else 1)
        self.origin = f"rows of one batch of {self._num_samples} samples, repeated in larger batches"
        self.why_draws = _why(num_draws, has_router, is_varied=False)

    def first(self, size: int) -> Batch:
        """Return the first rows."""
        return resized(self._example, size)

    def draws(self, size: int) -> list[Batch]:
        """Return batches of consecutive rows."""
        num_draws = max(1, min(self._wanted, self._num_samples // size))
        return [resized(self._example, size, draw * size) for draw in range(num_draws)]


class _DrawnBatches:
    """Draws from a function of the size. Sizes have to ascend."""

    def __init__(self, draw: BatchFn, seed: int, num_draws: int | None, has_router: bool) -> None:
        self._draw, self._seed, self._num_draws, self._has_router = draw, seed, num_draws, has_router
        self.entries: RequestEntries
        self._forms: set[Any] = set()
        self._num_calls = 0
        self._held: Batch = None
        self.origin = getattr(draw, "origin", "batches of the given function")

    @property
    def why_draws(self) -> str:
        """Reason for the number of draws."""
        return _why(self._num_draws, self._has_router, self._is_varied)

    @property
    def _is_varied(self) -> bool:
        return len(self._forms) > 1

    def first(self, size: int) -> Batch:
        """Return a batch, which is the first draw of its size later."""
        self._held = self._one(size)
        return self._held

    def draws(self, size: int) -> list[Batch]:
        """Return new batches: several if their shapes differ, or if the model chooses experts."""
        most = self._num_draws or min(_DRAWS, max(2, _MOST_SAMPLES // size))
        found = [self._one(size) if self._held is None else self._held]
        self._held = None
        self._add(found, size)
        depends = self._has_router or self._is_varied
        if self._num_draws or depends or size <= _SMALL or self._num_calls == 1:
            found += [self._one(size) for _ in range(most - 1)]
            self._add(found, size)
            depends = depends or self._is_varied
        return found if self._num_draws or depends else found[:1]

    def _one(self, size: int) -> Batch:
        self._num_calls += 1
        with generators_kept():
            seed_generators(self._seed + self._num_calls)
            try:
                batch = self._draw(size)
            except Exception as error:  # of any kind: this is code of the user
                raise ValueError(
                    f"example_batch({size}): expected a batch of {size} samples, got {type(error).__name__}: {error}."
                    " Pass a function that returns a batch of any of batch_sizes, or other batch_sizes."
                ) from error
        _check_size(batch, size)
        return batch

    def _add(self, batches: Sequence[Batch], size: int) -> None:
        """Keep the shapes of what the forward pass gets."""
        self._forms |= {forms_of(self.entries.of(batch), size) for batch in batches}


def _check_size(batch: Batch, size: int) -> None:
    """Check the number of samples where all tensors agree about it. Packed sequences have a single row."""
    try:
        check_resizable(batch)
        found = num_samples(batch)
    except ValueError:
        return
    if found not in {1, size}:
        raise ValueError(
            f"example_batch({size}): expected a batch of {size} samples, got {found}. Return as many samples as the"
            " argument says."
        )


def _why(num_draws: int | None, has_router: bool, is_varied: bool) -> str:
    if num_draws is not None:
        return "as requested"
    reasons = [*(["routers choose experts"] if has_router else []), *(["shapes differ"] if is_varied else [])]
    return f"several where there are enough samples, because {' and '.join(reasons)}" if reasons else _ONE
