"""Dense Hessians in float64, by double backward of the whole loss: nothing of the library is in them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["hessian_of_batches", "total_loss"]

LossFn = Callable[[nn.Module, Any], Tensor]


def total_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """Mean loss over all samples; the loss gets a copy of each batch."""
    with sdpa_kernel(SDPBackend.MATH):
        losses = [loss_fn(model, copy.deepcopy(batch)) for batch in batches]
    return torch.stack([size * loss for size, loss in zip(sizes, losses, strict=True)]).sum() / sum(sizes)


def hessian_of_batches(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    sizes: Sequence[int],
    names: Sequence[str],
    *,
    batched: bool = True,
) -> Tensor:
    """The Hessian of the mean loss by the named parameters, (P, P), row by row.

    Args:
        model: The model, in float64 and in evaluation mode.
        loss_fn: The loss.
        batches: The data.
        sizes: Samples by batch.
        names: Names of the parameters, in the order of the model.
        batched: Try all rows at once first.
    """
    named = dict(model.named_parameters())
    params = [named[name] for name in names]
    loss = total_loss(model, loss_fn, batches, sizes)
    gradient = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    if not flat.requires_grad:  # linear, as a bias under a linear loss
        return torch.zeros(len(flat), len(flat), dtype=torch.float64)
    units = torch.eye(len(flat), dtype=torch.float64)
    if batched:
        try:
            return _rows(flat, params, units, is_grads_batched=True)
        except RuntimeError:  # something in the network cannot be batched
            pass
    return torch.cat([_rows(flat, params, unit) for unit in units])


def _rows(flat: Tensor, params: Sequence[Tensor], directions: Tensor, is_grads_batched: bool = False) -> Tensor:
    rows = torch.autograd.grad(
        flat,
        params,
        directions,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
        is_grads_batched=is_grads_batched,
    )
    count = len(directions) if is_grads_batched else 1
    return torch.cat([row.reshape(count, -1) for row in rows], 1)
