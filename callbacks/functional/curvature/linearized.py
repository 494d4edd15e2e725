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
from moe_heads.callbacks.functional.curvature.partition import reuse_memory, split_by_inputs

__all__ = ["BoundGradient", "LinearizedGradient", "can_be_traced"]


class LinearizedGradient:
    """The directional derivative of the gradient of a loss, as a program that holds for all batches of one shape.

    Args:
        model: The model.
        loss_fn: The loss.
        params: The parameters to differentiate by, by name.
        batch: A batch of the shape.

    Raises:
        Exception: Whatever torch says of an operation that it cannot trace or has no forward derivative for, or of a
            model whose operations depend on the values in the batch.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: dict[str, Tensor], batch: Batch) -> None:
        self.shape = _shape_of(batch)
        loss = _Loss(model, loss_fn)
        values = {f"model.{name}": p.detach() for name, p in params.items()}

        def gradient(values: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
            def value(values: dict[str, Tensor]) -> Tensor:
                return cast(Tensor, torch.func.functional_call(loss, values, (batch,))).reshape(())

            return cast(dict[str, Tensor], torch.func.grad(value)(values))

        def derivative(*inputs: Tensor) -> list[Tensor]:
            tangents = dict(zip(values, inputs, strict=False))
            leaves = iter(inputs[len(values) :])
            traced = map_leaves(batch, lambda leaf: next(leaves) if isinstance(leaf, Tensor) else leaf)
            product = torch.func.jvp(lambda values: gradient(values, traced), (values,), (tangents,))[1]
            return list(product.values())

        leaves = _tensors_of(batch)
        with warnings.catch_warnings():
            # torch's own formulas of forward derivatives use torch.jit.script, which torch deprecates
            warnings.simplefilter("ignore")
            graph = make_fx(derivative)(*map(torch.zeros_like, values.values()), *leaves)
        per_batch, self._product = split_by_inputs(graph, range(len(values)))
        shared, self._per_batch = split_by_inputs(per_batch, range(len(leaves)))
        reuse_memory(self._product)
        self._shared: Sequence[Tensor] = shared()

    def bind(self, batch: Batch) -> "BoundGradient":
        """Compute what depends on the batch alone."""
        return BoundGradient(self._product, self._per_batch(*self._shared, *_tensors_of(batch)))


@dataclass(frozen=True, eq=False)
class BoundGradient:
    """The derivative of the gradient at one batch."""

    program: Callable[..., Sequence[Tensor]]
    constants: Sequence[Tensor]

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The derivative in the direction of ``tangents``, one tensor a parameter."""
        return self.program(*self.constants, *tangents)


def can_be_traced(batch: Batch) -> bool:
    """Whether a batch holds nothing but tensors, which a traced program can be given anew."""
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves_of(batch))


class _Loss(nn.Module):
    """The loss as a module, so that the parameters of the model can be replaced while it is computed."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self._loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]


def _shape_of(batch: Batch) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype, leaf.stride()) for leaf in _tensors_of(batch))
