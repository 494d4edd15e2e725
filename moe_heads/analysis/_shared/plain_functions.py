"""Functions of torch without a second derivative, as sums and products that have one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.analysis._shared.plain_losses import plain_multi_margin_loss, plain_multilabel_margin_loss

__all__ = ["plain_embedding_bag", "plain_functions", "plain_hardsigmoid", "plain_hardswish"]

_SUM, _MEAN, _MAX = 0, 1, 2
"""Numbers of the modes of torch.embedding_bag."""


@contextmanager
def plain_functions() -> Iterator[None]:
    """Replace functions of torch that cannot be differentiated twice, while the block runs.

    The entries of torch that all of ``torch.nn`` and ``torch.nn.functional`` call are replaced: hardsigmoid and
    hardswish, also in place, embedding_bag, multi_margin_loss and multilabel_margin_loss. The values and the gradients
    stay the same up to rounding. Scripted modules and ``torch.ops`` do not use these entries.
    """
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch._C._nn, "hardsigmoid", plain_hardsigmoid),
        (torch._C._nn, "hardsigmoid_", _in_place(plain_hardsigmoid)),
        (torch._C._nn, "hardswish", plain_hardswish),
        (torch._C._nn, "hardswish_", _in_place(plain_hardswish)),
        (torch._C._nn, "multi_margin_loss", plain_multi_margin_loss),
        (torch._C._nn, "multilabel_margin_loss", plain_multilabel_margin_loss),
        (torch, "embedding_bag", plain_embedding_bag),
    ]
    with ExitStack() as stack:
        for owner, name, plain in places:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, _or_original(plain, original))
        yield


def plain_hardsigmoid(x: Tensor) -> Tensor:
    """Return relu6(x + 3) / 6."""
    wide = _wide(x)
    return (F.relu6(wide + 3) / 6).to(x.dtype)


def plain_hardswish(x: Tensor) -> Tensor:
    """Return x relu6(x + 3) / 6."""
    wide = _wide(x)
    return (wide * F.relu6(wide + 3) / 6).to(x.dtype)


def plain_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `torch.embedding_bag`, the first from sums of rows of the weight."""
    detached = None if per_sample_weights is None else per_sample_weights.detach()
    options = (scale_grad_by_freq, mode, False, detached, include_last_offset, padding_idx)
    # the original checks the arguments and finds the largest rows
    found, bags, sizes, largest = _original_embedding_bag(weight.detach(), indices, offsets, *options)
    num_bags = len(found)
    starts = offsets[:num_bags]
    bag = torch.searchsorted(starts.contiguous(), torch.arange(len(indices), device=indices.device), right=True) - 1
    counts = _not_padded(indices, weight, padding_idx)
    per_bag = torch.zeros(num_bags, dtype=torch.long, device=weight.device).index_add(0, bag, counts.long())
    if mode == _MAX:
        rows = weight.gather(0, largest.long().clamp_min(0))
        return torch.where((per_bag > 0)[:, None], rows, 0), bags, sizes, largest
    rows = _wide(F.embedding(indices, weight)).masked_fill(~counts[:, None], 0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    total = rows.new_zeros(num_bags, weight.shape[1]).index_add(0, bag, rows)
    if mode == _MEAN:
        total = total / per_bag.clamp_min(1)[:, None]
    return total.to(weight.dtype), bags, sizes, largest


_original_embedding_bag = torch.embedding_bag


def _not_padded(indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    if padding_idx is None or padding_idx < -len(weight) or padding_idx == -1:
        return torch.ones_like(indices, dtype=torch.bool)
    return indices != padding_idx % len(weight)


def _wide(x: Tensor) -> Tensor:
    # torch computes half precision in float32 and rounds once
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _in_place(plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # of a copy, because the graph keeps the argument
    return lambda x: x.copy_(plain(x.clone()))


def _or_original(plain: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the plain function, which leaves integers, ``out=`` and gradients scaled by frequency to the original."""

    def call(*args: Any, **kwargs: Any) -> Any:
        is_plain = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point() and "out" not in kwargs
        scales = plain is plain_embedding_bag and (kwargs.get("scale_grad_by_freq") or (len(args) > 3 and args[3]))
        return plain(*args, **kwargs) if is_plain and not scales else original(*args, **kwargs)

    return call
