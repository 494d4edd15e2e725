"""A batch of any size from the samples of an example."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import Batch, leaves_of, map_leaves

__all__ = ["check_resizable", "num_rows", "resized"]


def num_rows(batch: Batch) -> int:
    """Length of the first tensor of an example that has a dimension: what its other sizes are multiples of.

    Raises:
        ValueError: If there is no such tensor.
    """
    for leaf in leaves_of(batch):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    raise ValueError(f"batch: expected a tensor with a batch dimension somewhere inside, got {type(batch).__name__}")


def check_resizable(batch: Batch) -> None:
    """Make sure that the samples of an example can be repeated and cut.

    Raises:
        ValueError: If something in it counts the samples elsewhere than in the first dimension of a tensor: a
            `PackedSequence`, a nested tensor, or a mask such as (T, B) or (B · heads, T, T). It would stay as it is.
    """
    given = num_rows(batch)
    for leaf in leaves_of(batch):
        found = _what_stays(leaf, given)
        if found:
            raise ValueError(
                f"example_batch: expected tensors whose first dimension counts the {given} samples, to be repeated to "
                f"each of batch_sizes, got {found}: reshape it in forward_fn, or time that size alone"
            )


def resized(batch: Batch, size: int) -> Batch:
    """A copy with its samples repeated or cut to ``size``; tensors that do not count the samples stay as they are."""
    given = num_rows(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != given or size == given:
            return leaf.clone()  # the model may write into it
        return leaf[torch.arange(size, device=leaf.device) % given]

    return map_leaves(batch, resize)


def _what_stays(leaf: object, given: int) -> str:
    """What counts the samples and cannot be repeated; "" for anything else."""
    if isinstance(leaf, PackedSequence):
        return f"a PackedSequence of {int(leaf.batch_sizes[0])} sequences"
    if not isinstance(leaf, Tensor):
        return ""
    if leaf.is_nested:
        return f"a nested tensor of {leaf.size(0)} sequences"
    shape = tuple(leaf.shape)
    if given == 1 or leaf.dim() < 2 or shape[0] == given:
        return ""
    is_mask_of_heads = leaf.dim() == 3 and shape[0] % given == 0 and shape[1] == shape[2]
    return f"a tensor of shape {shape}" if given in shape[1:] or is_mask_of_heads else ""
