"""Products with the Hessian of one batch, by the cheapest correct way.

The first choice is double backward through a first-order graph that is kept, with folded batch norms. The second
rebuilds the graph in each product. docs/results.md has the measurements.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.microbatches import Microbatches, free_memory, unless_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients, Graph
from moe_heads.analysis.sharpness.hessian.folding import Fold, find_folds, has_norms
from moe_heads.analysis.sharpness.hessian.gauss_newton import BatchGaussNewton
from moe_heads.analysis.sharpness.hessian.graph_memory import GraphMemory
from moe_heads.analysis.sharpness.hessian.loss_graph import NoSecondDerivative, check_checkpoints, checked_loss
from moe_heads.analysis.sharpness.hessian.unsupported_layer import unsupported_layer
from moe_heads.checks import check_option

__all__ = ["BatchProducts", "GraphMode", "Matrix", "Product"]

GraphMode = Literal["kept", "rebuilt"]

Matrix = Literal["hessian", "gauss_newton"]
"""The Hessian of the loss, or its Gauss-Newton matrix, which leaves out the curvature of the model's outputs."""

# Largest relative difference of two losses that rounding explains.
_SAME_LOSS = 1e-3


class Product(NamedTuple):
    """A batch's loss, and the derivative of its gradient in a direction, one tensor for each parameter."""

    loss: float
    rows: list[Tensor]


class BatchProducts:
    r"""Products :math:`\nabla^2 \ell_b v` with the Hessians of single batches' mean losses.

    The first product of a batch keeps its graph while there is memory. Before any fold is used, the first batch
    compares its product with plain double backward, and every batch compares the folded loss with the plain loss.

    Args:
        model: The model, in evaluation mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``; an `OutputLoss` for the Gauss-Newton matrix.
        params: The parameters, by name.
        data: The batches.
        progress: Checked before each batch.
        matrix: The matrix.
        memory: Maximum number of bytes to keep; None for the default.
        mode: "rebuilt" to keep and fold nothing; None for the best.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.

    Attributes:
        gradients: The model and its loss, as the products evaluate them.
        reason: Why something was not kept or folded; "" if there is no reason.

    Raises:
        ValueError: If the loss of the first batch is invalid.
        NoSecondDerivative: If a layer of a model with batch norms has none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        params: dict[str, Tensor],
        data: Microbatches,
        progress: Progress,
        *,
        matrix: Matrix = "hessian",
        memory: int | None = None,
        mode: GraphMode | None = None,
        seed: int = 0,
    ) -> None:
        if mode is not None:
            check_option("mode", mode, get_args(GraphMode))
        check_option("matrix", matrix, get_args(Matrix))
        kind = BatchGaussNewton if matrix == "gauss_newton" else BatchGradients
        self.gradients = kind(model, loss_fn, params, seed)
        self._monitor, self.reason = progress, ""
        self._kept: dict[int, tuple[float, Graph]] = {}
        self._memory: GraphMemory | None = None
        self._budget = memory
        first, *_ = data
        unless_out_of_memory(partial(self._check_checkpoints, first))
        if mode != "rebuilt":
            graphs = GraphMemory(memory, self.gradients.device)
            # A graph is seldom smaller than the gradient.
            self._memory = graphs if graphs.left >= self._gradient_bytes else None
            if has_norms(model) and unless_out_of_memory(partial(self._fold, data)) is None:
                self.release("memory ran out")

    @property
    def mode(self) -> GraphMode:
        """Way of computing a product: "kept" if the graph of a batch may be kept, otherwise "rebuilt"."""
        return "kept" if self._kept or self._memory is not None else "rebuilt"

    @property
    def num_folded(self) -> int:
        """Number of batch norms folded into the layer before them."""
        return len(self.gradients.folds)

    @property
    def num_kept(self) -> int:
        """Number of batches with a kept graph."""
        return len(self._kept)

    def is_kept(self, index: int) -> bool:
        """Return whether a graph of the batch is kept, or may be kept from now on."""
        return index in self._kept or self._memory is not None

    def product(self, index: int, batch: Batch, tangents: Sequence[Tensor]) -> Product:
        """Return the product of a batch with a vector, both as one part for each parameter.

        Raises:
            NoSecondDerivative: If a layer has none. The message names it.
        """
        try:
            if index not in self._kept and self._fits(index, batch):
                loss, values = self.gradients.gradient(index, batch)
                self._kept[index] = loss, self.gradients.without_values(values)
            keeps = index in self._kept
            loss, gradient = self._kept[index] if keeps else self.gradients.gradient(index, batch)
            return Product(loss, list(self.gradients.differentiate(gradient, tangents, retain_graph=keeps)))
        except NoSecondDerivative as error:
            raise self._named(error, batch) from error.__cause__

    def check_loss(self, index: int, batch: Batch) -> None:
        """Raise a ValueError for a batch whose loss is invalid."""
        with self.gradients.evaluation(index):
            checked_loss(self.gradients.loss_fn(self.gradients.model, batch), index)

    def release(self, reason: str = "") -> None:
        """Release the kept graphs, and keep none from now on."""
        self._kept, self._memory = {}, None
        self.reason = reason or self.reason
        free_memory()

    def pause(self) -> None:
        """Release the kept graphs. The next products build and keep them again."""
        if self._kept:
            self._kept, self._memory = {}, GraphMemory(self._budget, self.gradients.device)

    def _check_checkpoints(self, first: Batch) -> None:
        """Reject reentrant checkpoints, which only the graph of all parameters is sure to show."""
        with self.gradients.evaluation(0, freezes=False):
            check_checkpoints(checked_loss(self.gradients.loss_fn(self.gradients.model, first), 0))

    def _fits(self, index: int, batch: Batch) -> bool:
        """Return whether the graph of a batch may be kept. None is kept after the first that does not fit."""
        if self._memory is None:
            return False
        if self._memory.take(batch, self._gradient_bytes, lambda: self.gradients.gradient_bytes(index, batch)):
            return True
        self._memory = None
        return False

    @property
    def _gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.gradients.params.values())

    def _named(self, error: NoSecondDerivative, batch: Batch) -> NoSecondDerivative:
        gradients = self.gradients
        layer = unsupported_layer(gradients.model, lambda: gradients.loss_fn(gradients.model, batch), str(error))
        return NoSecondDerivative(f"{layer}: {error}") if layer else error

    def _fold(self, data: Microbatches) -> bool:
        """Fold batch norms that follow their layer in every batch, if the function stays the same. Return True."""
        folds: list[Fold] = []
        try:
            for index, batch in enumerate(data):
                self._monitor.tick()
                plain, there = self._unfolded(index, batch)
                folds = [fold for fold in (folds if index else there) if fold in there]
                if not folds:
                    return True
                is_right = index > 0 or self._is_same_product(batch, folds)
                self.gradients.folds = folds
                folded = self.gradients.loss(index, batch)
                if not is_right or abs(folded - plain) > _SAME_LOSS * max(abs(plain), abs(folded)):
                    self.reason, folds = "folded batch norms gave a different product", []
                    return True
                self.gradients.folds = []
        except TimeUp:
            self.reason, folds = "there was no time to compare folded batch norms", []
        except BaseException:
            folds = []  # folds that were not verified are not used
            raise
        finally:
            self.gradients.folds = folds
        return True

    def _unfolded(self, index: int, batch: Batch) -> tuple[float, list[Fold]]:
        """Return the loss of the plain model at a batch, and the folds that are possible there."""
        losses: list[float] = []
        there = find_folds(self.gradients.model, lambda: losses.append(self.gradients.loss(index, batch)))
        return losses[0], there

    def _is_same_product(self, batch: Batch, folds: list[Fold]) -> bool:
        """Return whether the first batch has the same product with a random vector, folded and plain."""
        generator = torch.Generator().manual_seed(0)
        params = list(self.gradients.params.values())
        tangents = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]
        # Rounding moves a few units across the kink of a ReLU. 1e-3 accepts them, but no wrong formula.
        tolerance = 1e-3 if params[0].dtype == torch.float32 else 1e-7
        products = []
        for chosen in ([], folds):
            self.gradients.folds = chosen
            self._monitor.tick()
            try:
                _, gradient = self.gradients.gradient(0, batch)
                products.append(self.gradients.differentiate(gradient, tangents, retain_graph=False))
            except NoSecondDerivative as error:
                raise self._named(error, batch) from error.__cause__
        pairs = list(zip(*products, strict=True))
        difference = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs)
        size = sum(float(a.square().sum(dtype=torch.float64)) for a, _ in pairs)
        return difference <= tolerance**2 * size
