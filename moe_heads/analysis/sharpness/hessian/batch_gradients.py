"""Loss, gradient and double backward of one batch."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import Linearized, LossGradient
from moe_heads.analysis.sharpness.hessian.folding import Fold, folded
from moe_heads.analysis.sharpness.hessian.loss_graph import (
    checked_loss,
    gradient_with_graph,
    has_custom_function,
    saved_bytes,
    second_order_errors,
)

__all__ = ["BatchGradients", "Graph"]

Graph = tuple[Tensor | GradientEdge, ...]
"""A gradient with a graph by parameter, or the ends of the graph without the values."""


class BatchGradients:
    """Losses and gradients of single batches, the same in every evaluation.

    Args:
        model: The model, in evaluation mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        params: The parameters to differentiate by, by name.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.

    Attributes:
        model: The model.
        loss_fn: The loss, called with a copy of each batch.
        params: The parameters.
        device: Their device.
        folds: Batch norms folded into the layer before them.
        reaches: Whether the loss of some batch depends on the parameters.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: dict[str, Tensor], seed: int = 0) -> None:
        self.model, self.loss_fn, self.params = model, on_copies(loss_fn), params
        self.device, self._seed = next(iter(params.values())).device, seed
        self.folds: list[Fold] = []
        self.reaches = False
        chosen = {id(p) for p in params.values()}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]

    @contextmanager
    def evaluation(self, index: int, *, freezes: bool = True) -> Iterator[None]:
        """Fold batch norms, set the random numbers of the batch, and freeze the parameters that are not selected.

        Args:
            index: Index of the batch.
            freezes: False for a graph of all parameters.
        """
        with ExitStack() as stack:
            stack.enter_context(folded(self.folds))
            stack.enter_context(self.random_numbers(index))
            if freezes:
                stack.enter_context(self._frozen())
            yield

    def random_numbers(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which the loss of a batch draws the random numbers of this analysis."""
        return _replayed(self.device, self._seed + index)

    def loss(self, index: int, batch: Batch) -> float:
        """Return the mean loss of a batch, which may be nan or inf."""
        with self.evaluation(index):
            return float(self.loss_fn(self.model, batch).detach())

    def has_custom_function(self, index: int, batch: Batch) -> bool:
        """Return whether a custom autograd function computes a part of the loss of a batch."""
        with self.evaluation(index):
            return has_custom_function(checked_loss(self.loss_fn(self.model, batch), index))

    def gradient(self, index: int, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
        """Return the mean loss of a batch, and its gradient with a graph.

        Raises:
            ValueError: If the loss is invalid.
            NoSecondDerivative: If a layer has none, as far as torch detects it here.
        """
        with self.evaluation(index):
            loss = checked_loss(self.loss_fn(self.model, batch), index)
            params = tuple(self.params.values())
            if not loss.requires_grad:
                return float(loss.detach()), tuple(map(torch.zeros_like, params))
            self.reaches = True
            return float(loss.detach()), gradient_with_graph(loss, params)

    def without_values(self, gradient: tuple[Tensor, ...]) -> Graph:
        """Return the graph of a gradient for `differentiate`, which does not need its values."""
        return tuple(get_gradient_edge(g) if g.requires_grad else g.new_empty(0) for g in gradient)

    def differentiate(self, gradient: Graph, tangents: Sequence[Tensor], *, retain_graph: bool) -> Sequence[Tensor]:
        """Return the derivative of a gradient in a direction, one tensor for each parameter.

        Raises:
            NoSecondDerivative: If a layer has none.
        """
        # A gradient without a graph is constant (an unused or a linear parameter), and its derivative is zero.
        pairs = zip(gradient, tangents, strict=True)
        curved = [(g, tangent) for g, tangent in pairs if isinstance(g, GradientEdge) or g.requires_grad]
        if not curved:
            return [torch.zeros_like(tangent) for tangent in tangents]
        outputs, directions = zip(*curved, strict=True)
        # A checkpoint recomputes its part of the model here, which needs the same frozen parameters.
        with self._frozen(), second_order_errors():
            return torch.autograd.grad(
                outputs,
                tuple(self.params.values()),
                directions,
                retain_graph=retain_graph,
                allow_unused=True,
                materialize_grads=True,
            )

    def linearized(self, double: DoubleLoss, index: int, batch: Batch, exact: Sequence[Tensor]) -> Linearized:
        """Return the matrix of a batch in float64.

        Args:
            double: The loss in float64.
            index: Index of the batch.
            batch: The batch, or a part of it.
            exact: The parameters, float64.
        """

        def evaluate(batch: Batch, params: Sequence[Tensor]) -> Tensor:
            with self.random_numbers(index):
                return double(batch, params)

        return LossGradient(evaluate, batch, exact)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Freeze the parameters that are not selected."""
        try:
            for other in self._others:
                other.requires_grad_(False)
            yield
        finally:
            for other in self._others:
                other.requires_grad_(True)

    def gradient_bytes(self, index: int, batch: Batch) -> int:
        """Return the memory in bytes of the graph of a batch's gradient, without the parameters."""
        # The measured graph is discarded, because autograd misses in-place changes under the measuring hooks.
        return saved_bytes(lambda: self.gradient(index, batch), excluded=self.model.parameters())


@contextmanager
def _replayed(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators inside the block, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
