"""Batches of any size from one example: the samples are repeated or cut."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import Batch, leaves_of, map_leaves

__all__ = ["check_resizable", "few_samples", "num_samples", "resized"]

# enough to run a model, and few enough to cost nothing
_FEW = 2


def num_samples(batch: Batch) -> int:
    """Return the length of the first tensor with a dimension, which counts the samples.

    Raises:
        ValueError: If there is no such tensor.
    """
    for leaf in leaves_of(batch):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    raise ValueError(f"example_batch: expected a batch that holds a batched tensor, got {type(batch).__name__}")


def check_resizable(batch: Batch) -> None:
    """Check that the samples of a batch can be repeated and cut.

    Raises:
        ValueError: If an entry counts the samples elsewhere than in the first dimension of a tensor: a
            `PackedSequence`, a nested tensor, or a mask of shape (T, B) or (B · heads, T, T).
    """
    given = num_samples(batch)
    for leaf in leaves_of(batch):
        fixed = ""
        if isinstance(leaf, PackedSequence):
            fixed = f"a PackedSequence of {int(leaf.batch_sizes[0])} sequences"
        elif isinstance(leaf, Tensor) and leaf.is_nested:
            fixed = f"a nested tensor of {leaf.size(0)} sequences"
        elif isinstance(leaf, Tensor) and leaf.dim() > 1 and given != 1 and leaf.shape[0] != given:
            shape = tuple(leaf.shape)
            is_mask_of_heads = len(shape) == 3 and shape[0] % given == 0 and shape[1] == shape[2]
            fixed = f"a tensor of shape {shape}" if given in shape[1:] or is_mask_of_heads else ""
        if fixed:
            raise ValueError(
                f"example_batch: expected tensors whose first dimension counts the {given} samples, got {fixed}. "
                f"Reshape the entry in forward_fn, or set batch_sizes=[{given}]."
            )


def few_samples(batch: Batch) -> Batch:
    """Return the first samples of a batch, or the whole batch if it cannot be cut."""
    try:
        check_resizable(batch)
        return resized(batch, min(num_samples(batch), _FEW))
    except ValueError:
        return batch


def resized(batch: Batch, size: int, skip: int = 0) -> Batch:
    """Copy a batch with its samples repeated or cut to ``size``; other tensors keep their shapes.

    Args:
        batch: The batch.
        size: Number of samples of the copy.
        skip: Number of samples to skip at the start. The first sample follows the last one.
    """
    given = num_samples(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != given or (size == given and skip == 0):
            return leaf.clone()  # the model may modify it
        return leaf[torch.arange(skip, skip + size, device=leaf.device) % given]

    return map_leaves(batch, resize)
