"""Copies of batches, so that in-place changes by a user's function do not affect later evaluations."""

import copy
import types
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import Batch, map_leaves

__all__ = ["on_copies", "own_copy"]

T = TypeVar("T")

# Types that are immutable or not data.
_SHARED = (
    *(bool, int, float, complex, str, bytes, type(None), type, range),
    *(torch.dtype, torch.device, torch.Size, nn.Module, types.ModuleType, types.FunctionType, types.MethodType),
)


def own_copy(batch: Batch) -> Batch:
    """Copy a batch: containers are new, tensors are cloned, other objects are deep-copied.

    A tensor that occurs twice in the batch occurs twice in the copy. An object that cannot be copied (for example one
    that holds a lock or a file) is shared with the copy.

    Example:
        >>> import torch
        >>> from moe_heads.analysis._shared.copies import own_copy
        >>> batch = {"x": torch.zeros(2), "labels": torch.ones(2)}
        >>> labels = own_copy(batch).pop("labels").mul_(5)
        >>> batch["labels"]
        tensor([1., 1.])
    """
    known: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if id(leaf) not in known:
            known[id(leaf)] = _copy_of(leaf)
        return known[id(leaf)]

    return map_leaves(batch, copied)


def on_copies(function: Callable[[nn.Module, Batch], T]) -> Callable[[nn.Module, Batch], T]:
    """Wrap ``function(model, batch)`` so that each call receives a copy of the batch."""
    if getattr(function, "_is_on_copies", False):
        return function

    def called(model: nn.Module, batch: Batch) -> T:
        return function(model, own_copy(batch))

    called._is_on_copies = True  # type: ignore[attr-defined]
    return called


def _copy_of(leaf: Any) -> Any:
    if isinstance(leaf, _SHARED):
        return leaf
    if isinstance(leaf, Tensor):
        return _clone(leaf)
    if isinstance(leaf, PackedSequence):
        parts: list[Any] = [None if part is None else _clone(part) for part in leaf]
        return type(leaf)(*parts)
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return leaf.copy()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # of any kind: its class decides what copying does
        return leaf


def _clone(tensor: Tensor) -> Tensor:
    # the copy of a leaf that requires a gradient is a leaf too
    if tensor.requires_grad and tensor.is_leaf:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone()
