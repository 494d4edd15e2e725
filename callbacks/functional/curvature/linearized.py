"""Hessian-vector products by forward over reverse mode, traced once, with all that is constant computed beforehand.

The derivative of the gradient in a direction v is linear in v. Traced as a graph of tensor operations it falls into
three parts: what depends on the weights alone, what depends on the batch, and what depends on v. Only the last runs for
every product: two gradients' worth of arithmetic at most, instead of three.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moe_heads.callbacks.functional.common.batches import Batch, LossFn, leaves_of, map_leaves
from moe_heads.callbacks.functional.curvature.partition import (
    merge_equal,
    refuse_dynamic_sizes,
    reuse_memory,
    split_by_inputs,
)

__all__ = ["BoundGradient", "LinearizedGradient", "form_of"]


class LinearizedGradient:
    """The directional derivative of the gradient of a loss, as a program that holds for all batches of one form.

    Args:
        model: The model.
        loss_fn: The loss.
        params: The parameters to differentiate by, by name.
        batch: A batch of the form.

    Attributes:
        form: The form; see `form_of`.

    Raises:
        ValueError: If the loss reaches the parameters other than through the model's modules, or an operation has a
            result whose size depends on the values in the batch.
        Exception: Whatever torch says of an operation that it cannot trace or has no forward derivative for.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: dict[str, Tensor], batch: Batch) -> None:
        self.form = form_of(batch)
        loss = _Loss(model, loss_fn)
        values = {f"model.{name}": p.detach() for name, p in params.items()}

        def value(values: dict[str, Tensor], batch: Batch) -> Tensor:
            return cast(Tensor, torch.func.functional_call(loss, values, (batch,))).reshape(())

        if value(values, batch).requires_grad:
            # a loss that holds the parameters itself, for a penalty say: the program would take them for constants
            raise ValueError("the loss reaches parameters other than through the modules of the model")

        def derivative(*inputs: Tensor) -> list[Tensor]:
            tangents = dict(zip(values, inputs, strict=False))
            leaves = iter(inputs[len(values) :])
            traced = map_leaves(batch, lambda leaf: next(leaves) if isinstance(leaf, Tensor) else leaf)
            gradient = torch.func.grad(value)
            product = torch.func.jvp(lambda values: gradient(values, traced), (values,), (tangents,))[1]
            return list(product.values())

        leaves = _tensors_of(batch)
        with warnings.catch_warnings():
            # torch's own formulas of forward derivatives use torch.jit.script, which torch deprecates
            warnings.simplefilter("ignore")
            graph = make_fx(derivative)(*map(torch.zeros_like, values.values()), *leaves)
        refuse_dynamic_sizes(graph)
        merge_equal(graph)
        per_batch, self._product = split_by_inputs(graph, range(len(values)))
        shared, self._per_batch = split_by_inputs(per_batch, range(len(leaves)))
        reuse_memory(self._product)
        with torch.no_grad():
            self._shared: Sequence[Tensor] = shared()

    @torch.no_grad()
    def bind(self, batch: Batch) -> "BoundGradient":
        """Compute what depends on the batch alone."""
        constants = self._per_batch(*self._shared, *_tensors_of(batch))
        shared = {_storage(tensor) for tensor in self._shared}
        own = {_storage(c): c.untyped_storage().nbytes() for c in constants if _storage(c) not in shared}
        return BoundGradient(self._product, constants, sum(own.values()))


@dataclass(frozen=True, eq=False)
class BoundGradient:
    """The derivative of the gradient at one batch.

    Attributes:
        program: Computes it from the constants and the direction.
        constants: What depends on the batch and the weights alone.
        num_bytes: Memory of those of them that are this batch's own.
    """

    program: Callable[..., Sequence[Tensor]]
    constants: Sequence[Tensor]
    num_bytes: int

    @torch.no_grad()
    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The derivative in the direction of ``tangents``, one tensor a parameter."""
        return self.program(*self.constants, *tangents)


def form_of(batch: Batch) -> Any | None:
    """What batches have in common that a program can be given: containers, keys, and shapes and strides of tensors.

    None for a batch that holds something else than tensors, which a program would take for a constant. Equal forms
    compare as equal.
    """
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves_of(batch)):
        return None
    return map_leaves(batch, lambda leaf: None if leaf is None else (tuple(leaf.shape), leaf.dtype, leaf.stride()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Loss(nn.Module):
    """The loss as a module, so that the parameters of the model can be replaced while it is computed."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self._loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
