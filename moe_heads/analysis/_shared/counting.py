"""Number of samples of a batch, inferred from the shapes of its tensors."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["BatchSizeFn", "BatchWeightFn", "batch_size", "checked_size", "checked_weight"]

BatchSizeFn = Callable[[Any], int]
"""``batch_size_fn(batch) -> int``: the number of samples of a batch."""

BatchWeightFn = Callable[[Any], float]
"""``batch_weight_fn(batch) -> float``: the divisor of the batch loss, such as a number of samples, labels or tokens."""

_REMEDY = "Pass batch_size_fn=lambda batch: ... that returns the number of samples of a batch."

# Attributes with the number of samples of a batch object in graph libraries.
_SIZE_ATTRIBUTES = ("num_graphs", "batch_size")


@dataclass(frozen=True)
class _Vote:
    """Candidates for the number of samples, derived from one entry of a batch."""

    name: str
    numbers: frozenset[int]
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{' or '.join(map(str, sorted(self.numbers)))} ({self.name or 'the batch'})"


def batch_size(batch: Any, name: str = "batch") -> int:
    """Count the samples of a batch.

    A tensor contributes its first dimension, a list of samples in a field its length, and a graph object its
    ``num_graphs`` or ``batch_size``. Numbers, strings, tensors without a dimension, and tensors that are broadcast over
    the samples, such as a mask (1, T), are ignored.

    Args:
        batch: A batch.
        name: Name of the batch in messages.

    Raises:
        ValueError: If no entry has a number of samples, or the entries disagree.
    """
    strong: list[_Vote] = []
    weak: list[_Vote] = []
    _collect(batch, "", strong, weak, is_field=False)
    votes = _without_broadcast(strong) or weak
    numbers = _agreed(votes)
    if strong and isinstance(batch, list) and _are_samples(batch) and not isinstance(batch[0], Tensor):
        # the list may hold samples or fields; both conventions are common
        numbers |= _one(len(batch))
        votes = [*votes, _Vote("the length of the list", _one(len(batch)))]
    if not votes:
        raise ValueError(
            f"{name}: expected at least one tensor with a batch dimension, got {type(batch).__name__}. {_REMEDY}"
        )
    if len(numbers) != 1:
        raise ValueError(
            f"{name}: expected entries that agree on the number of samples, got first dimensions"
            f" {', '.join(map(str, votes))}. {_REMEDY}"
        )
    return next(iter(numbers))


def checked_size(function: BatchSizeFn, batch: Any, name: str) -> int:
    """Return ``batch_size_fn(batch)`` after checking that it is a nonnegative integer.

    Raises:
        ValueError: If it is not.
    """
    given = function(batch)
    value = _number(given)
    if value is None or value < 0 or value != int(value):
        raise ValueError(f"batch_size_fn: expected the number of samples of {name}, got {given!r}.")
    return int(value)


def checked_weight(function: BatchWeightFn, batch: Any, name: str) -> float:
    """Return ``batch_weight_fn(batch)`` after checking that it is a finite, nonnegative number.

    Raises:
        ValueError: If it is not.
    """
    given = function(batch)
    value = _number(given)
    if value is None or value < 0:
        raise ValueError(f"batch_weight_fn: expected a finite number of at least 0 for {name}, got {given!r}.")
    return value


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _collect(value: Any, name: str, strong: list[_Vote], weak: list[_Vote], *, is_field: bool) -> None:
    """Add the votes of an entry and its contents: strong ones of tensors and objects, weak ones of plain lists."""
    if isinstance(value, PackedSequence):
        strong.append(_Vote(name, _one(int(value.batch_sizes[0]))))
    elif isinstance(value, (Tensor, np.ndarray)):
        if isinstance(value, Tensor) and value.is_nested:
            strong.append(_Vote(name, _one(value.size(0))))
        elif value.ndim > 0:
            strong.append(_Vote(name, _one(value.shape[0]), tuple(value.shape)))
    elif (fields := _fields_of(value)) is not None:
        for key, entry in fields:
            _collect(entry, f"{name}{key}", strong, weak, is_field=True)
    elif isinstance(value, (list, tuple)) and is_field:
        _collect_list(value, name, strong, weak)
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            _collect(entry, f"{name}[{place}]", strong, weak, is_field=True)
    elif (size := _own_size(value)) is not None:
        strong.append(_Vote(name, _one(size)))


def _collect_list(value: Sequence[Any], name: str, strong: list[_Vote], weak: list[_Vote]) -> None:
    """Add the votes of a list inside a batch: a list of samples, or of tensors that each hold all samples."""
    inside: list[_Vote] = []
    _collect(value, name, inside, [], is_field=False)
    if not inside:
        if value:
            weak.append(_Vote(name, _one(len(value))))
        return
    numbers = _agreed(_without_broadcast(inside))
    if _are_samples(value):
        numbers |= {len(value)}
    strong.extend([_Vote(name, numbers)] if numbers else inside)


def _fields_of(value: Any) -> Iterable[tuple[str, Any]] | None:
    """Return the named fields of a container, or None for other values."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", value[key]) for key in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{key}", getattr(value, key)) for key in value._fields]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _own_size(value: Any) -> int | None:
    """Return the number of samples that an object reports in an attribute, or None."""
    for attribute in _SIZE_ATTRIBUTES:
        size = getattr(value, attribute, None)
        if isinstance(size, int) and not isinstance(size, bool) and hasattr(value, "to"):
            return size
    return None


def _are_samples(values: Sequence[Any]) -> bool:
    """Return whether the entries of a list look like samples: nonempty and all of one structure."""
    forms = {_form_of(value) for value in values}
    return len(forms) == 1 and None not in forms


def _form_of(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, Tensor):
        return Tensor, value.dim(), value.dtype
    if isinstance(value, Mapping):
        return type(value), tuple(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return type(value), tuple(map(_form_of, value))
    if dataclasses.is_dataclass(value):
        return (type(value),)
    return (type(value),) if isinstance(value, (int, float, str, np.ndarray)) or hasattr(value, "to") else None


def _without_broadcast(votes: list[_Vote]) -> list[_Vote]:
    """Remove the votes of tensors with first dimension 1 that are broadcast over the samples."""
    whole = [vote for vote in votes if vote.numbers != {1} or len(vote.shape) < 2]
    dims = {dim for vote in whole for dim in vote.shape[1:]}
    kept = []
    for vote in votes:
        wide = [dim for dim in vote.shape if dim != 1]
        if vote in whole or not wide or not set(wide) <= dims:
            kept.append(vote)
    return kept


def _agreed(votes: Sequence[_Vote]) -> frozenset[int]:
    numbers = votes[0].numbers if votes else frozenset()
    for vote in votes:
        numbers &= vote.numbers
    return numbers


def _one(number: int) -> frozenset[int]:
    return frozenset({int(number)})
