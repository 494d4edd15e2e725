"""Batches of tensors in any common container: map, move, cut and pass them to a model."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.counting import batch_size

__all__ = [
    "BY_NAME",
    "Batch",
    "ForwardFn",
    "LossFn",
    "batch_size",
    "call_model",
    "cut",
    "is_divisible",
    "is_movable_object",
    "leaves_of",
    "map_leaves",
    "num_rows",
    "to_device",
]

Batch = Any
"""A tensor, a tuple, list, mapping or dataclass of tensors, or any object that the loss function accepts."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""``loss_fn(model, batch) -> scalar``: the mean over the samples of the batch."""

ForwardFn = Callable[[nn.Module, Batch], Any]
"""``forward_fn(model, batch) -> output``: the output of the model."""


BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of the parameters that can be passed by name."""


def map_leaves(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Apply ``function`` to every leaf of a batch and return the results in new containers.

    Containers are lists, tuples, named tuples, mutable mappings and dataclasses. torch's own pytrees treat a dataclass
    or a `UserDict` (the type that Hugging Face tokenizers return) as a leaf.
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, PackedSequence):  # a named tuple, but its fields have no meaning alone
            return function(value)
        if isinstance(value, MutableMapping):
            copied = copy.copy(value)
            for key in value:
                copied[key] = mapped(value[key])
            return copied
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(mapped, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(mapped, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            new: Any = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(new, field.name, mapped(getattr(value, field.name)))  # frozen ones as well
            return new
        return function(value)

    return mapped(batch)


def leaves_of(batch: Batch) -> list[Any]:
    """Return all leaves of a batch in order."""
    leaves: list[Any] = []
    map_leaves(batch, leaves.append)
    return leaves


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor of a batch, and every other object with a method ``to``, to ``device``."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return leaf.to(device)  # type: ignore[arg-type]
        is_movable = isinstance(leaf, Tensor) or is_movable_object(leaf)
        return leaf.to(device) if is_movable else leaf

    return map_leaves(batch, moved)


def is_movable_object(leaf: Any) -> bool:
    """Return whether an object other than a tensor has a method ``to``, as batches of graph libraries do."""
    is_data = not isinstance(leaf, (Tensor, PackedSequence, nn.Module, type))
    return is_data and callable(getattr(leaf, "to", None))


def is_divisible(batch: Batch) -> bool:
    """Return whether a batch can be cut by samples: it holds tensors only, all with the same first dimension.

    A batch with other contents (strings, graphs, ragged lists) is used as a whole or not at all.
    """
    leaves = [leaf for leaf in leaves_of(batch) if leaf is not None]
    lengths = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() > 0 else -1 for leaf in leaves}
    return len(lengths) == 1 and -1 not in lengths


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return the samples ``start`` to ``stop`` of a divisible batch as views of its tensors."""
    return map_leaves(batch, lambda leaf: None if leaf is None else leaf[start:stop])


def num_rows(batch: Batch) -> int:
    """Return the number of rows of the first tensor of a batch, 0 if there is none."""
    sizes = (len(leaf) for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return next(sizes, 0)


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call the model, the default `ForwardFn`: ``model(batch[0])`` for a tuple or list, ``model(batch)`` for a tensor.

    For a mapping or a dataclass, the entries that match parameters of ``forward`` are passed by name.

    Raises:
        ValueError: If a mapping has no entry for a parameter without a default.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        given = {name: value for name, value in batch.items() if takes_all or name in names}
        missing = [p.name for p in parameters if p.default is p.empty and p.kind in BY_NAME and p.name not in given]
        if missing:
            raise ValueError(
                f"batch: expected an entry for each required parameter of {type(model).__name__}.forward, got"
                f" {list(batch)} without {missing}. Pass forward_fn=lambda model, batch: ... to call the model."
            )
        return model(**given)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
