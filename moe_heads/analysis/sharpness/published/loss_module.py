"""The model and its loss as PyHessian gets them: a module that gives the loss, and a criterion that passes it on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis.sharpness.published.loader import Carried, Loader

__all__ = ["LossModule", "pass_on"]


class LossModule(nn.Module):
    """A model whose output is its loss, as PyHessian's ``model``."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, flat: Sequence[Tensor], loader: Loader) -> None:
        super().__init__()
        self.model = model
        # bound, because an attribute that is a module would add its parameters to those of this one
        self._loss = partial(loss_fn, model)
        self._flat = tuple(flat)
        self._loader = loader
        self._known = {id(p) for p in model.parameters()}

    def forward(self, carried: Carried) -> Tensor:
        """Mean loss of the batch."""
        loss = self._loss(carried.batch).reshape(())
        for p in self._flat:
            # Not 0·Σp: its gradient is a constant, on which PyHessian stops too.
            loss = loss + 0.0 * p.square().sum()
        # backward() also writes a graph into every other leaf, such as an input with a gradient penalty
        for leaf in _leaves(loss):
            if id(leaf) not in self._known:
                self._loader.strays.append((leaf, leaf.grad))
                leaf.grad = None
        return loss


def pass_on(loss: Tensor, carried: Carried) -> Tensor:
    """The loss, as PyHessian's ``criterion``."""
    return loss


def _leaves(loss: Tensor) -> list[Tensor]:
    """Tensors at the ends of a graph, into whose ``.grad`` backward() writes."""
    leaves = []
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
    return leaves
