"""Products with the Hessian of one batch, by the cheapest way that is possible and right.

The ladder: forward over reverse mode, traced (`LinearizedGradient`); double backward through a first-order graph that
is kept; the same with the graph rebuilt. Measured in docs/results.md.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal, get_args

from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn
from moe_heads.callbacks.functional.common.memory import memory_budget
from moe_heads.callbacks.functional.common.microbatches import Microbatches, free_memory, unless_out_of_memory
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.curvature.batch_gradients import BatchGradients
from moe_heads.callbacks.functional.curvature.folding import Fold, find_folds
from moe_heads.callbacks.functional.curvature.linearized import BoundGradient, LinearizedGradient, form_of
from moe_heads.callbacks.functional.curvature.loss_graph import checked_loss
from moe_heads.callbacks.functional.curvature.product_check import Product, ProductCheck
from moe_heads.checks import check_option

__all__ = ["CPU_GRAPH_MEMORY", "BatchProducts", "GraphMode"]

CPU_GRAPH_MEMORY = 4 * 2**30
"""Bytes that may be kept between products on a CPU unless the caller says otherwise, or half of what is free."""

GraphMode = Literal["linearized", "kept", "rebuilt"]

# A trace takes seconds. It saves a fifth of each product, which pays in some fifty products of graphs of this size.
_TRACE_ABOVE = 64 * 2**20

# Memory of a batch's graph that tracing it takes for a moment.
_TRACING_FACTOR = 4

# Relative difference of two losses that rounding explains.
_SAME_LOSS = 1e-3


class BatchProducts:
    r"""Products :math:`\nabla^2 \ell_b v` with the Hessians of single batches' mean losses.

    What is kept between products, and whether batch norms are folded, is settled once. A traced program and a fold are
    compared with the plain double backward on the first batch, and the folded loss with the plain one on every batch,
    before anything relies on them.

    Args:
        model: The model, in evaluation mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        params: The parameters, by name.
        data: The batches.
        monitor: Looked at before each batch.
        memory: Bytes that may be kept; None for the default.
        mode: The first way to try, without folds for "rebuilt"; None for the best.

    Attributes:
        mode: How the first batch is done, "linearized", "kept" or "rebuilt".
        num_folded: Batch norms that are folded into the layer before them.
        num_kept: Batches, the first ones, for which something is kept; the others are rebuilt in each product.
        reason: Why a faster way was not taken; "" where there is none.
    """

    mode: GraphMode

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        params: dict[str, Tensor],
        data: Microbatches,
        monitor: Monitor,
        *,
        memory: int | None = None,
        mode: GraphMode | None = None,
        seed: int = 0,
    ) -> None:
        if mode is not None:  # by default the cheapest that is right
            check_option("mode", mode, get_args(GraphMode))
        self._gradients = BatchGradients(model, loss_fn, params, seed)
        self._monitor = monitor
        self._program: LinearizedGradient | None = None
        self._kept: list[Product] = []
        self.mode, self.reason = "rebuilt", ""
        if memory is None:
            memory = memory_budget(self._gradients.device, on_cpu=CPU_GRAPH_MEMORY, share_of_gpu=1 / 2)
        if unless_out_of_memory(partial(self._settle, data, memory, mode)) is None:
            self.release("memory ran out")

    @property
    def num_folded(self) -> int:
        """Batch norms that are folded."""
        return len(self._gradients.folds)

    @property
    def num_kept(self) -> int:
        """Batches for which something is kept."""
        return len(self._kept)

    def product(self, index: int, batch: Batch, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The product of a batch with a vector, both in the parts that belong to the parameters."""
        if index < len(self._kept):
            return self._kept[index](tangents)
        gradient = self._gradients.gradient(index, batch)
        return self._gradients.differentiate(gradient, tangents, retain_graph=False)

    def check_loss(self, index: int, batch: Batch) -> None:
        """Refuse a batch whose loss is not what it should be."""
        with self._gradients.evaluation(index):
            checked_loss(self._gradients.loss_fn(self._gradients.model, batch), index)

    def release(self, reason: str = "") -> None:
        """Let go of all that is kept."""
        self._kept, self._program = [], None
        self.mode, self.reason = "rebuilt", reason or self.reason
        free_memory()

    def _settle(self, data: Microbatches, memory: int, mode: GraphMode | None) -> bool:
        """Find the way; True."""
        first, *_ = data
        check = ProductCheck(self._gradients, first)
        if mode == "rebuilt":
            return True
        self._fold(check, data)
        sizes = self._sizes(data, memory)
        num_fitting = sum(total <= memory for total in accumulate(sizes))
        if num_fitting == 0:
            return True
        bound = self._traced(data, sizes, memory, check, forced=mode == "linearized") if mode != "kept" else None
        if bound is not None:
            self.mode = "linearized"
            self._keep(data, memory, bound)
        else:
            self.mode = "kept"
            for index, batch in enumerate(list(data)[:num_fitting]):
                self._monitor.tick()
                self._kept.append(self._through_graph(index, batch))
        return True

    def _fold(self, check: ProductCheck, data: Microbatches) -> None:
        """Fold batch norms that follow their layer in every batch, if that is the same function."""
        folds = check.folds
        try:
            for index, batch in enumerate(data):
                if not folds:
                    return
                self._monitor.tick()
                plain, there = self._unfolded(index, batch)
                folds = [fold for fold in folds if fold in there]
                self._gradients.folds = folds
                is_right = index > 0 or check.passes(self._through_graph(0, batch))
                folded = self._gradients.loss(index, batch)
                if not is_right or abs(folded - plain) > _SAME_LOSS * max(abs(plain), abs(folded)):
                    self.reason = "folded batch norms gave another product"
                    return
                self._gradients.folds = []
        finally:
            self._gradients.folds = []  # what was not seen to be right is not used
        self._gradients.folds = folds

    def _unfolded(self, index: int, batch: Batch) -> tuple[float, list[Fold]]:
        """Loss of the plain model at a batch, and the folds that are possible there."""
        losses: list[float] = []
        there = find_folds(self._gradients.model, lambda: losses.append(self._gradients.loss(index, batch)))
        return losses[0], there

    def _traced(
        self, data: Microbatches, sizes: Sequence[int], memory: int, check: ProductCheck, forced: bool
    ) -> BoundGradient | None:
        """The derivative at the first batch, by a program that is seen to be right and worth its trace."""
        first, *_ = data
        form = form_of(first)
        if form is None:
            self.reason = "the first batch holds something else than tensors"
            return None
        alike = [size for size, batch in zip(sizes, data, strict=True) if form_of(batch) == form]
        if not forced and (sum(alike) < _TRACE_ABOVE or _TRACING_FACTOR * sizes[0] > memory):
            return None
        try:
            with self._gradients.evaluation(0):
                program = LinearizedGradient(
                    self._gradients.model, self._gradients.loss_fn, self._gradients.params, first
                )
                bound = program.bind(first)
            is_right = check.passes(bound)
        except Exception as error:  # of any kind: what cannot be traced is differentiated by autograd
            self.reason = f"{type(error).__name__}: {error}"
            return None
        if not is_right:
            self.reason = "the traced derivative gave another product"
            return None
        if not forced and bound.num_bytes * len(alike) > memory >= sum(sizes):
            return None  # all of the graphs fit, and not all of what the program keeps
        self._program = program
        return bound

    def _keep(self, data: Microbatches, memory: int, first: BoundGradient) -> None:
        """What is kept for each batch, as long as it fits: counted as it is made."""
        self._kept, held = [first], first.num_bytes
        for index, batch in enumerate(data):
            if index == 0:
                continue
            self._monitor.tick()
            product, num_bytes = self._bound(index, batch)
            held += num_bytes
            if held > memory:
                return
            self._kept.append(product)

    def _bound(self, index: int, batch: Batch) -> tuple[Product, int]:
        program = self._program
        if program is not None and form_of(batch) == program.form:
            try:
                with self._gradients.evaluation(index):
                    bound = program.bind(batch)
                return bound, bound.num_bytes
            except RuntimeError as error:
                self.reason, self._program = f"batch {index}: {error}", None
        return self._through_graph(index, batch), self._gradients.gradient_bytes(index, batch)

    def _through_graph(self, index: int, batch: Batch) -> Product:
        gradient = self._gradients.gradient(index, batch)
        return partial(self._gradients.differentiate, gradient, retain_graph=True)

    def _sizes(self, data: Microbatches, memory: int) -> list[int]:
        """Bytes of each batch's gradient and graph, measured once for each form."""
        # Each batch's gradient is held as well. Most of the time this alone tells for a large model.
        gradient = sum(p.numel() * p.element_size() for p in self._gradients.params.values())
        sizes: list[int] = []
        known: list[tuple[Any, int]] = []
        for index, batch in enumerate(data):
            if gradient > memory or sum(sizes) > memory:
                sizes.append(gradient)  # it does not fit any more: how large it is does not matter
                continue
            form = form_of(batch)
            size = next((size for other, size in known if form is not None and other == form), None)
            if size is None:
                self._monitor.tick()
                size = self._gradients.gradient_bytes(index, batch)
                known.append((form, size))
            sizes.append(size)
        return sizes
