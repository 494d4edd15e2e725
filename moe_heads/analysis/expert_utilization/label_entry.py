"""Entry of a batch that holds the labels.

Shapes: B samples, T tokens, C classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch

__all__ = ["UnclearLabelsError", "labels_of"]

# Usual names of the labels in mappings, named tuples, dataclasses and batch objects.
_NAMES = ("labels", "label", "y", "target", "targets")


class UnclearLabelsError(ValueError):
    """Error of `labels_of` if a batch does not show which of its entries holds the labels.

    Attributes:
        is_odd: Whether a user would expect that the labels are found. False if no entry has a usual name.
    """

    def __init__(self, message: str, is_odd: bool) -> None:
        super().__init__(message)
        self.is_odd = is_odd


def labels_of(batch: Batch) -> Any:
    """Return the entry of a batch that holds the labels, or None. It is the default ``label_fn``.

    The labels are the entry or attribute "labels", "label", "y", "target" or "targets", or the second entry of a pair.
    Of a tuple or list with more entries, they are the only entry after the first that can be labels of any kind.
    Otherwise they are not guessed: (inputs, lengths, labels) and (inputs, labels, weights) may have the same shapes.

    Raises:
        UnclearLabelsError: If several entries can be the labels, or integers (B,) have another name.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.label_entry import labels_of
        >>> labels_of({"x": torch.zeros(2, 5), "y": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, Mapping):
        entries = {name: batch[name] for name in _NAMES if name in batch}
        named = {f"batch[{name!r}]": entry for name, entry in entries.items() if entry is not None}
    else:
        entries = {name: getattr(batch, name, None) for name in _NAMES}
        named = {f"batch.{name}": e for name, e in entries.items() if e is not None and not callable(e)}
    if not named and isinstance(batch, (tuple, list)):
        after_first = {f"batch[{place}]": entry for place, entry in enumerate(batch) if place > 0}
        if len(batch) == 2:
            return batch[1]
        named = {name: entry for name, entry in after_first.items() if _can_be_labels(entry, batch[0])}
    elif not named and isinstance(batch, Mapping):
        classes = {f"batch[{name!r}]": entry for name, entry in batch.items() if _are_whole_numbers(entry)}
        if classes:
            raise UnclearLabelsError(_message(classes, f"an entry {', '.join(map(repr, _NAMES))}"), is_odd=False)
    if len(named) > 1:
        raise UnclearLabelsError(_message(named, "only one entry that can be the labels"), is_odd=True)
    return next(iter(named.values()), None)


def _message(candidates: Mapping[str, Any], expected: str) -> str:
    shown = ", ".join(f"{name} ({_described(entry)})" for name, entry in candidates.items())
    return f"batch: expected {expected}, got {shown}. Pass label_fn=lambda batch: {list(candidates)[-1]}, for example."


def _described(entry: Any) -> str:
    return f"{tuple(entry.shape)}, {entry.dtype}" if isinstance(entry, Tensor) else type(entry).__name__


def _can_be_labels(entry: Any, first: Any) -> bool:
    """Return whether an entry can be labels of any kind: classes, lengths, targets, one-hot rows, strings."""
    if not isinstance(entry, Tensor):
        return isinstance(entry, (list, tuple)) and len(entry) > 0 and not isinstance(entry[0], Tensor)
    if entry.dim() == 0 or (isinstance(first, Tensor) and first.shape[:1] != entry.shape[:1]):
        return False
    is_mask = entry.dtype == torch.bool and entry.dim() > 1
    # more dimensions are inputs, such as a second view of the images
    return not is_mask and entry.dim() <= (2 if entry.is_floating_point() else 3)


def _are_whole_numbers(entry: Any) -> bool:
    """Return whether an entry is integers of shape (B,) or (B, 1)."""
    if not isinstance(entry, Tensor) or entry.is_floating_point() or entry.is_complex():
        return False
    return entry.dim() == 1 or (entry.dim() == 2 and entry.shape[1] == 1)
