"""Shapes of the tensors of a batch: as text for a summary, and as a key that is equal for batches of equal cost."""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import Batch, is_movable_object, leaves_of

__all__ = ["forms_of", "shapes_of"]


def shapes_of(batch: Batch) -> str:
    """Return the shapes of a batch as text, with the names of the entries of a mapping.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.inference_timing.shapes import shapes_of
        >>> shapes_of({"ids": torch.zeros(8, 32), "scale": torch.ones(())})
        'ids 8×32'
    """
    if isinstance(batch, Mapping):
        found = {name: shapes_of(value) for name, value in batch.items()}
        return ", ".join(f"{name} {shapes}" for name, shapes in found.items() if shapes)
    return ", ".join(filter(None, map(_shape, leaves_of(batch))))


def _shape(leaf: Any) -> str:
    if isinstance(leaf, PackedSequence):
        return f"packed {'×'.join(map(str, leaf.data.shape))}"
    if isinstance(leaf, Tensor) and leaf.is_nested:
        return f"nested {leaf.size(0)}"
    return "×".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) and leaf.dim() > 0 else ""


def forms_of(batch: Batch, size: int) -> Hashable:
    """Return a key of the shapes of a batch without its number of samples.

    Objects that are no tensors, such as graphs, have a key of their own, since their cost is unknown.
    """
    return tuple(_form(leaf, size) for leaf in leaves_of(batch))


def _form(leaf: Any, size: int) -> Hashable:
    if isinstance(leaf, PackedSequence):
        return "packed", tuple(leaf.batch_sizes.tolist())
    if isinstance(leaf, Tensor) and leaf.is_nested:
        return "nested", tuple(tuple(part.shape) for part in leaf.unbind())
    if hasattr(leaf, "shape"):
        shape: list[Any] = list(leaf.shape)
        if size in shape:
            shape[shape.index(size)] = "samples"
        return tuple(shape)
    if isinstance(leaf, str):
        return len(leaf)
    return id(leaf) if is_movable_object(leaf) else type(leaf).__qualname__
