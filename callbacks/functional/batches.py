"""The data side of every analysis: batches of tensors in any common container, and their number of samples."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Batch", "ForwardFn", "LossFn", "as_batches", "batch_size", "call_model", "labels_of", "to_device"]

Batch = Any
"""A tensor, or a tuple, list, dict or other pytree that holds tensors whose first dimension counts the samples."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch."""

ForwardFn = Callable[[nn.Module, Batch], Any]
"""``forward_fn(model, batch) -> output`` of the model."""


def as_batches(batches: Iterable[Batch]) -> list[Batch]:
    """List of the batches.

    Raises:
        ValueError: If there are none, one of them holds no sample, or a tensor stands in place of the list.
    """
    if isinstance(batches, Tensor):
        raise ValueError(f"batches: expected a list of batches; got one tensor, {tuple(batches.shape)}: pass [tensor]")
    listed = list(batches)
    if not listed or any(batch_size(batch) == 0 for batch in listed):
        raise ValueError(
            "batches: expected at least one batch with at least one sample each; got an empty loader or batch"
        )
    return listed


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch: the length of its first tensor that has a dimension.

    Raises:
        ValueError: If the batch holds no such tensor.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError(f"batch: expected a tensor with a batch dimension somewhere inside; got {type(batch).__name__}")


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on ``device``."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Default `ForwardFn`: ``model(batch[0])`` for a tuple or list, ``model(batch)`` for a tensor.

    Of a dict, the entries that ``forward`` has parameters for are passed by name.
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        return model(**{name: value for name, value in batch.items() if takes_all or name in names})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def labels_of(batch: Batch) -> Tensor | None:
    """Class labels of an ``(inputs, labels)`` batch: its second entry when that is a 1-D integer tensor, else None."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    labels = batch[1]
    is_labels = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return labels if is_labels else None
