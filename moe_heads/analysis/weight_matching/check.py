"""Checks that permutations leave the loss of a batch unchanged."""

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.state import write_back
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.weight_matching.group import Group, Tensors

__all__ = ["LossCheck"]

# Largest relative change of the loss by another order of summation, in float64 and in lower precision.
_TOLERANCES = {True: 1e-9, False: 1e-4}


class LossCheck:
    """Loss of a network before and after a permutation, on one batch.

    Args:
        model: The model, whose tensors are overwritten; the caller restores them.
        loss_fn: The loss.
        batch: The batch.
        tensors: Parameters and buffers of the network that is permuted.

    Attributes:
        largest_change: Largest relative change of the loss among the permutations that passed.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batch: Batch, tensors: Tensors) -> None:
        self._model, self._loss_fn, self._batch, self._tensors = model, loss_fn, batch, tensors
        self._is_double = True
        self.largest_change = 0.0
        self._center = self._loss(tensors)

    def failure(self, group: Group, seed: int) -> str:
        """Return how much a random permutation of a group changes the loss, or "" if it does not."""
        drawn = group.random(torch.Generator().manual_seed(seed))
        return self.difference({**self._tensors, **group.apply(self._tensors, drawn)})

    def difference(self, permuted: Tensors) -> str:
        """Return how much the loss differs for permuted tensors, or "" if it is equal up to rounding."""
        loss = self._loss(permuted)
        change = abs(loss - self._center) / max(abs(loss), abs(self._center), 1e-30)
        if change <= _TOLERANCES[self._is_double]:
            self.largest_change = max(self.largest_change, change)
            return ""
        return f"a permutation changes the loss from {self._center:.8g} to {loss:.8g}"

    @torch.no_grad()
    def _loss(self, tensors: Tensors) -> float:
        named: dict[str, Tensor] = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, tensor in named.items():
            write_back(tensor, tensors[name].to(tensor.device))
        torch.manual_seed(0)
        if self._is_double:
            try:
                return float(DoubleLoss(self._model, self._loss_fn, {})(self._batch))
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                self._is_double = False  # a layer without float64
        return float(self._loss_fn(self._model, own_copy(self._batch)))
