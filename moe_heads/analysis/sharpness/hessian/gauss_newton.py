r"""Products with the Gauss-Newton matrix of one batch, :math:`J^T H_f J` (Schraudolph 2002)."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients, Graph
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import Linearized
from moe_heads.analysis.sharpness.hessian.loss_graph import (
    check_checkpoints,
    checked_loss,
    gradient_with_graph,
    second_order_errors,
)
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLoss, Outputs

__all__ = ["BatchGaussNewton"]


class BatchGaussNewton(BatchGradients):
    r"""Losses of single batches, and products with their Gauss-Newton matrices.

    With J the Jacobian of the outputs and :math:`H_f` the Hessian of the loss with respect to the outputs, a product
    takes three steps. :math:`u \mapsto J^T u` is a linear function with a graph, and its transpose gives :math:`Jv`.
    Double backward through the loss of the outputs alone gives :math:`H_f J v`. A backward pass through the model gives
    the rest. The graphs of all three can be kept.

    Args:
        model: The model, in evaluation mode.
        loss_fn: The loss as a function of the outputs.
        params: The parameters to differentiate by, by name.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.

    Raises:
        ValueError: If ``loss_fn`` is not an `OutputLoss`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: dict[str, Tensor], seed: int = 0) -> None:
        if not isinstance(loss_fn, OutputLoss):
            raise ValueError(
                f"loss_fn: expected an OutputLoss for the Gauss-Newton matrix, got {loss_fn!r}. A scalar loss does not"
                " define this matrix. Pass OutputLoss(outputs_fn, output_loss)."
            )
        super().__init__(model, loss_fn, params, seed)
        self._parts = loss_fn

    @override
    def gradient(self, index: int, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
        """Return the mean loss of a batch, and the tensors from which `differentiate` computes products."""
        with self.evaluation(index):
            found = self._parts.separate(self.model, batch)
            loss = checked_loss(found.loss, index)
            check_checkpoints(found.outputs)
            self.reaches = self.reaches or found.outputs.requires_grad
            return float(loss.detach()), _linearized(found, tuple(self.params.values()))

    @override
    def without_values(self, gradient: tuple[Tensor, ...]) -> Graph:
        return gradient  # the graph of the loss of the outputs starts from values

    @override
    def gradient_bytes(self, index: int, batch: Batch) -> int:
        return super().gradient_bytes(index, batch) + sum(p.numel() * p.element_size() for p in self.params.values())

    @override
    def differentiate(self, gradient: Graph, tangents: Sequence[Tensor], *, retain_graph: bool) -> Sequence[Tensor]:
        # A checkpoint recomputes its part of the model here, which needs the same frozen parameters.
        with self._frozen(), second_order_errors():
            graph = cast(tuple[Tensor, ...], gradient)
            return _product(graph, tuple(self.params.values()), tangents, retain_graph=retain_graph)

    @override
    def linearized(self, double: DoubleLoss, index: int, batch: Batch, exact: Sequence[Tensor]) -> Linearized:
        def evaluate(params: Sequence[Tensor]) -> Outputs:
            with self.random_numbers(index):
                return double.evaluate(self._parts.separate, batch, params)

        return _InDouble(evaluate, exact)


class _InDouble:
    r"""The Gauss-Newton matrix of one batch in float64, and the function :math:`J^T \nabla \ell(f(\theta))`.

    J stays that of the given parameters, so the matrix is the derivative of this function.

    Args:
        evaluate: Returns outputs and loss at given parameters.
        exact: The parameters.
    """

    def __init__(self, evaluate: Callable[[Sequence[Tensor]], Outputs], exact: Sequence[Tensor]) -> None:
        self._evaluate, self._exact = evaluate, tuple(exact)
        found = evaluate(exact)
        self._outputs, self._graph = found.outputs, _linearized(found, self._exact)
        self.gradient = self._pulled_back(found)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return _product(self._graph, self._exact, tangents, retain_graph=True)

    def gradient_at(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._pulled_back(self._evaluate(params))

    def _pulled_back(self, found: Outputs) -> Sequence[Tensor]:
        return _derivative((self._outputs,), self._exact, (_slope(found),), retain_graph=True)


def _linearized(found: Outputs, params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    r"""Return :math:`J^T u` by parameter, u, the outputs, their values as a leaf, and the gradient at these.

    It is empty if the outputs do not depend on the parameters.

    Raises:
        NoSecondDerivative: If a layer has none, as far as torch detects it here.
    """
    if not found.outputs.requires_grad:
        return ()
    cotangent = torch.zeros_like(found.outputs, requires_grad=True)
    rows = gradient_with_graph(found.outputs, params, cotangent)
    slope = gradient_with_graph(found.loss, (found.point,)) if found.loss.requires_grad else (cotangent.detach(),)
    return (*rows, cotangent, found.outputs, found.point, *slope)


def _product(
    graph: tuple[Tensor, ...], params: tuple[Tensor, ...], tangents: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor]:
    """Return the product with tangents, from the result of `_linearized`."""
    if not graph:
        return [torch.zeros_like(p) for p in params]
    *rows, cotangent, outputs, point, slope = graph
    pushed = _derivative(rows, (cotangent,), tangents, retain_graph=retain_graph)
    bent = _derivative((slope,), (point,), pushed, retain_graph=retain_graph)
    return _derivative((outputs,), params, bent, retain_graph=retain_graph)


def _derivative(
    outputs: Sequence[Tensor], inputs: tuple[Tensor, ...], cotangents: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor]:
    """Return a vector-Jacobian product, zero where nothing depends on an input."""
    curved = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not curved:
        return [torch.zeros_like(x) for x in inputs]
    there, directions = zip(*curved, strict=True)
    return torch.autograd.grad(
        there, inputs, directions, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )


def _slope(found: Outputs) -> Tensor:
    if not found.loss.requires_grad:
        return torch.zeros_like(found.point)
    return torch.autograd.grad(found.loss, found.point, allow_unused=True, materialize_grads=True, retain_graph=True)[0]
