"""The Hessian of a mean loss as a linear operator, exact up to rounding (Pearlmutter 1994)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.microbatches import Microbatches, unless_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.hessian.products import BatchProducts, GraphMode, Matrix, Product
from moe_heads.analysis.sharpness.hessian.weighted_sum import InterruptedProduct, WeightedSum

__all__ = ["HessianOperator", "SymmetricOperator"]


class SymmetricOperator(Protocol):
    """A real symmetric matrix, given by its products with vectors of ``dtype`` on ``device``.

    It may be a sum over ``num_strata`` parts of the data. A product with one part costs its share of the whole product.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        ...

    @property
    def num_strata(self) -> int:
        """Number of parts whose sum is the matrix; 1 for a matrix without parts."""
        ...

    @property
    def stratum_weights(self) -> Tensor:
        """Share of each part in the data, (S,), float64; they sum to 1."""
        ...

    @property
    def forms(self) -> Tensor:
        """:math:`v^T H_s v` of each part and the vector of the last product with the whole matrix, (S,), float64."""
        ...

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product of the whole matrix or of one part with a vector of shape (P,), a new tensor."""
        ...


class HessianOperator(WeightedSum):
    r"""The Hessian :math:`H = \nabla^2_\theta \frac{1}{N} \sum_i \ell_i(\theta)` of a loss, as products with vectors.

    The batches are weighted by their number of samples (or by ``batch_weight_fn``), so uneven batches give the Hessian
    of one large batch. The products are exact up to rounding. A parameter that no sample uses (in an idle expert) has a
    zero row. Layers before the parameters, such as the backbone below a head, are computed once and kept with the rest.

    A product costs about 2 gradients if the first-order graph is kept, and 3 to 4 if it is rebuilt. Graphs are kept for
    as many batches as fit into ``graph_memory``. If memory runs out nevertheless, the kept graphs are released, then
    the batches are halved. The product stays the same.

    The mode of the model is not changed, so call this inside `analysis_mode`, and do not change the model between
    products. Layers that draw random numbers draw the same ones in every product. `WeightedSum` documents the
    attributes.

    Args:
        model: The model. Its parameters and their ``.grad`` do not change.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the parameters.
        params: The parameters :math:`\theta`: tensors, or names of parameters and modules such as "head"; by default
            all that require a gradient, in the order of ``model.named_parameters()``.
        matrix: "gauss_newton" for the Gauss-Newton matrix in place of the Hessian. ``loss_fn`` is then an `OutputLoss`.
        graph_memory: Maximum number of bytes to keep between products. The default is 4 GiB on a CPU, but at most half
            of the free memory, and half of the free memory on a GPU.
        mode: "rebuilt" to keep nothing and fold no batch norm; by default the fastest way.
        progress: Checked before each batch.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default inferred from its tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Raises:
        ValueError: If there is nothing to differentiate, the parameters are not all float32 or all float64 on one
            device, the data is empty, the loss is not a finite scalar that depends on the parameters, or the model uses
            reentrant checkpointing.
        RuntimeError: If a custom autograd function of the model is marked once_differentiable.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import HessianOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> hessian = HessianOperator(model, lambda m, batch: m(batch).square().mean(), [x[:1], x[1:]])
        >>> hessian.matvec(torch.tensor([1.0, 1.0]))  # of the mean of w1^2 and 4 w2^2
        tensor([1., 4.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Batch],
        params: Selection | None = None,
        *,
        matrix: Matrix = "hessian",
        graph_memory: int | None = None,
        mode: GraphMode | None = None,
        progress: Progress | None = None,
        seed: int = 0,
        batch_size_fn: BatchSizeFn | None = None,
        batch_weight_fn: BatchWeightFn | None = None,
    ) -> None:
        named = selected_parameters(model, params)
        self._watch = _FirstValue(progress or Progress())
        device = next(iter(named.values())).device
        data = Microbatches(batches, device, self._watch, batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
        super().__init__(named, data)
        self.matrix = matrix
        self._products = BatchProducts(
            model,
            loss_fn,
            named,
            self._data,
            progress or Progress(),
            matrix=matrix,
            memory=graph_memory,
            mode=mode,
            seed=seed,
        )

    @property
    @override
    def mode(self) -> GraphMode:
        """Way of computing a product: "kept" or "rebuilt"."""
        return self._products.mode

    @property
    def num_folded(self) -> int:
        """Number of batch norms folded into the layer before them."""
        return self._products.num_folded

    @property
    @override
    def reason(self) -> str:
        """Reason why a faster way was not used; "" if there is none."""
        return self._products.reason

    @property
    def num_kept(self) -> int:
        """Number of batches with a graph that is kept between products."""
        return self._products.num_kept

    @property
    def gradients(self) -> BatchGradients:
        """Loss and gradient of a batch, evaluated as in the products."""
        return self._products.gradients

    def check_second_derivative(self) -> None:
        """Compute the product of the first batch, which is not counted.

        Raises:
            RuntimeError: If a layer has no second derivative.
        """
        ones = [torch.ones(shape, dtype=self.dtype, device=self.device) for shape in self._shapes]
        self._sum(ones, lambda origin: origin == 0)

    def pause(self) -> None:
        """Release the kept graphs until the next product."""
        self._products.pause()

    @override
    def release(self) -> None:
        """Release the kept graphs and the other ranks. A further product rebuilds the graphs."""
        super().release()
        self._products.release()

    @override
    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        r"""Return the sums over the samples of this process, or of one stratum, each with its weight.

        Returns:
            :math:`\sum_i w_i \nabla^2 \ell_i v`, then the part of each stratum in
            :math:`\sum_i w_i v^T \nabla^2 \ell_i v`, then :math:`\sum_i w_i \ell_i`; (P + S + 1,).

        Raises:
            ValueError: If it is not finite. The message names the batch with such a loss.
            RuntimeError: If a layer has no second derivative.
        """
        parts = [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]
        try:
            total = self._sum(parts, self.is_in(stratum))
        except _NoRoomForKept:
            self._products.release("memory ran out")
            total = self._sum(parts, self.is_in(stratum))
        if stratum is None and self._is_alone and not self.gradients.reaches:
            raise ValueError(
                "loss_fn: expected a loss that depends on the parameters, got losses without a graph of them for all"
                " batches. Compute the loss from the output of the model."
            )
        # The sum is nan or inf if one of the entries is, and cheaper to check.
        if not (bool(total.sum().isfinite()) or bool(total.isfinite().all())):
            for index, batch in enumerate(self._data):
                self._products.check_loss(index, batch)
            raise ValueError("loss_fn: expected a loss with finite second derivatives, got nan or inf in a product Hv")
        return total

    def _sum(self, parts: Sequence[Tensor], wanted: Callable[[int], bool]) -> Tensor:
        size = self.num_parameters + self.num_strata + 1
        total: Tensor | None = None
        done = 0.0

        def product(index: int, batch: Batch) -> tuple[int, Product]:
            # Seeded by the original batch, so that pieces of a cut batch draw the same numbers in every product.
            origin = self._data.origins[index]
            if not self._products.is_kept(origin):
                return origin, self._products.product(origin, batch, parts)
            found = unless_out_of_memory(lambda: self._products.product(origin, batch, parts))
            if found is None:
                raise _NoRoomForKept
            return origin, found

        try:
            # BatchGradients copies each batch itself.
            for weight, (origin, found) in self._data.evaluate(product, wanted=wanted, copies=False):
                is_first = total is None
                if total is None:
                    # after the product, and written row by row, so that it takes the place of the released rows
                    total = torch.empty(size, dtype=self.dtype, device=self.device)
                    total[self.num_parameters :] = 0
                self._add(total, origin, weight, found, parts, is_first=is_first)
                done += weight
                self._watch.has_value = True
        except TimeUp:
            # The batches are in the order of the samples.
            num_samples = round(self.num_samples * done / self.total_weight)
            vector = torch.cat([part.reshape(-1) for part in parts])
            self.interrupted = None if total is None else InterruptedProduct(vector, total.div_(done), num_samples)
            raise
        return torch.zeros(size, dtype=self.dtype, device=self.device) if total is None else total

    def _add(
        self,
        total: Tensor,
        origin: int,
        weight: float,
        found: Product,
        parts: Sequence[Tensor],
        *,
        is_first: bool,
    ) -> None:
        """Add the product of a batch to the sums, and release its rows one by one. The first overwrites them."""
        form, loss = total[self.num_parameters + origin % self.num_strata], total[-1]
        places = total[: self.num_parameters].split(self._sizes)
        for index, (place, part) in enumerate(zip(places, parts, strict=True)):
            row, target = found.rows[index], place.view_as(part)
            found.rows[index] = part.new_empty(0)
            if is_first and row.layout == torch.strided:
                torch.mul(row, weight, out=target)
            elif is_first:  # the sparse gradient of an embedding
                target.zero_().add_(row, alpha=weight)
            else:
                target.add_(row, alpha=weight)
            form.add_((row * part).sum(), alpha=weight)
        loss.add_(found.loss, alpha=weight)


class _FirstValue(Progress):
    """A progress that ignores the end of the time until the first batch has a product."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._watched, self.has_value = progress, False

    def tick(self) -> None:
        try:
            self._watched.tick()
        except TimeUp:
            if self.has_value:
                raise


class _NoRoomForKept(Exception):
    """There is no memory for a product in addition to the kept graphs."""
