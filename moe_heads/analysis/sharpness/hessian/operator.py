"""The Hessian of a mean loss as a linear operator, exact up to rounding (Pearlmutter 1994)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.microbatches import Microbatches, unless_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters, slices_of
from moe_heads.analysis.sharpness.hessian.products import BatchProducts, GraphMode, Product

__all__ = ["HessianOperator", "SymmetricOperator"]

# On a ResNet-8 sixteen cut the variance of the trace's samples 3 to 9 times; each costs a random vector of its own.
_MOST_STRATA = 16


class SymmetricOperator(Protocol):
    """A real symmetric matrix, known only by its products with vectors of ``dtype`` on ``device``.

    It may be a sum over ``num_strata`` parts of the data, each of which can be multiplied with by itself at its share
    of the cost.
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
        """Number of parts whose sum is the matrix; 1 for one that has no parts."""
        ...

    @property
    def stratum_weights(self) -> Tensor:
        """Share of each part in the data, (S,), float64; they sum to 1."""
        ...

    @property
    def forms(self) -> Tensor:
        """:math:`v^T H_s v` of each part and the last vector that the whole was multiplied with, (S,), float64."""
        ...

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Product with a vector of shape (P,), of the whole matrix or of one part."""
        ...


class HessianOperator:
    r"""The Hessian :math:`H = \nabla^2_\theta \frac{1}{N} \sum_i \ell_i(\theta)` of a loss, as products with vectors.

    The batches are weighted by their number of samples (or by ``batch_weight_fn``), so uneven batches give the Hessian
    of one large batch. The products are exact up to rounding. A parameter that no sample reaches (an idle expert) has a
    zero row. What the parameters do not touch, the backbone below a head, say, is computed once and kept with the rest.

    A product costs about 2 gradients where the first-order graph is kept, and 3 to 4 where it is rebuilt. As many
    batches are kept as fit into ``graph_memory``. Where memory runs out all the same, what is kept is given up, then
    the batches are halved: the product stays the same.

    The model is used as it is found: call inside `analysis_mode`, and do not change the model between products. Layers
    that draw random numbers draw the same ones in every product.

    Args:
        model: The model; its parameters are neither changed nor given a ``.grad``.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the parameters.
        params: The parameters :math:`\theta`: tensors, or names of parameters and modules such as "head"; by default
            all that require a gradient, in the order of ``model.named_parameters()``.
        graph_memory: Bytes that may be kept between products; by default 4 GiB on a CPU, if that is not more than half
            of what is free, and half of the free memory on a GPU.
        mode: "rebuilt" to keep nothing and fold no batch norm; by default the fastest way.
        progress: Looked at before each batch.
        seed: Seed of torch's random numbers in the first batch; each batch has the next.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Attributes:
        names: Names of the parameters, in the order of the flat vector.
        slices: Place of each parameter in the flat vector, by name.
        num_samples: N.
        total_weight: Sum of the weights of the batches, by which the products are divided: N by default.
        num_strata: Parts of the data that can be multiplied with alone: the batches, or groups of them, at most 16.
        stratum_weights: Share of each part in the data, which sum to 1, (S,), float64.
        forms: :math:`v^T H_s v` of each part and the last vector that the whole was multiplied with; they sum to
            :math:`v^T H v`.
        center_loss: Mean loss over the data, as it is differentiated; nan before the first product.
        interrupted: What there is of a product that the end of the time interrupted.

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
        graph_memory: int | None = None,
        mode: GraphMode | None = None,
        progress: Progress | None = None,
        seed: int = 0,
        batch_size_fn: BatchSizeFn | None = None,
        batch_weight_fn: BatchWeightFn | None = None,
    ) -> None:
        named = selected_parameters(model, params)
        self.names = tuple(named)
        first, *_ = named.values()
        self.dtype, self.device = first.dtype, first.device
        self.slices = slices_of(named)
        self._shapes = [p.shape for p in named.values()]
        self._sizes = [p.numel() for p in named.values()]
        self.num_parameters = sum(self._sizes)
        self._watch = _FirstValue(progress or Progress())
        self._data = Microbatches(
            batches, self.device, self._watch, batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn
        )
        self._batch_weights = list(self._data.weights)
        self.num_strata = min(len(self._data), _MOST_STRATA)
        self.num_samples, self.total_weight = self._data.num_samples, self._data.total_weight
        self._weight_differentiated = 0.0
        self._total: Callable[[Tensor, int | None], Tensor] | None = None  # this process alone
        self._is_alone = True
        self._products = BatchProducts(
            model, loss_fn, named, self._data, progress or Progress(), memory=graph_memory, mode=mode, seed=seed
        )
        self.forms = torch.zeros(self.num_strata, dtype=torch.float64)
        self.stratum_weights = self.own_stratum_weights() / self.total_weight
        self.center_loss = math.nan
        self.interrupted: InterruptedProduct | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.num_parameters, self.num_parameters

    @property
    def mode(self) -> GraphMode:
        """How a product is computed: "kept" or "rebuilt"."""
        return self._products.mode

    @property
    def num_folded(self) -> int:
        """Batch norms that are folded into the layer before them."""
        return self._products.num_folded

    @property
    def reason(self) -> str:
        """Why a faster way was not taken; "" where there is none."""
        return self._products.reason

    @property
    def num_kept(self) -> int:
        """Batches for which something is kept between products."""
        return self._products.num_kept

    @property
    def num_products(self) -> int:
        """Products so far; those with single strata count by their samples."""
        return math.ceil(self._weight_differentiated / self._weight_here(None) - 1e-9)

    @property
    def data(self) -> Microbatches:
        """The samples of this process."""
        return self._data

    @property
    def gradients(self) -> BatchGradients:
        """Loss and gradient of a batch, as the products evaluate them."""
        return self._products.gradients

    def own_stratum_weights(self) -> Tensor:
        """Weight of the samples of this process in each stratum, (S,), float64."""
        return torch.tensor([self._weight_here(s) for s in range(self.num_strata)], dtype=torch.float64)

    def over_ranks(
        self,
        total: Callable[[Tensor, int | None], Tensor] | None,
        *,
        num_samples: int,
        stratum_weights: Tensor,
    ) -> None:
        """From now on multiply with the Hessian of all ranks' samples.

        Args:
            total: The sum of ``sample_sum(v, stratum)`` over the ranks; None on a rank that only adds its part.
            num_samples: Samples of all ranks.
            stratum_weights: Sum of the weights over the ranks, by stratum; as many as the rank with the most has.
        """
        self._total, self.num_samples, self._is_alone = total, num_samples, False
        self.num_strata, self.total_weight = len(stratum_weights), float(stratum_weights.sum())
        self.stratum_weights = stratum_weights / self.total_weight

    def release(self) -> None:
        """Let go of what was kept and of the other ranks; a further product would compute everything anew."""
        self._total = None
        self._products.release()

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Product :math:`Hv`, or a stratum's part of it: the parts of all strata sum up to it.

        Args:
            vector: v, shape (P,), in the order of ``names``.
            stratum: Number of the stratum; None for all of the data.

        Returns:
            Hv, shape (P,), dtype of the parameters.

        Raises:
            ValueError: If ``vector`` has another shape, or the product is not finite.
            RuntimeError: If a layer has no second derivative.
        """
        if vector.shape != (self.num_parameters,):
            raise ValueError(f"vector: expected shape ({self.num_parameters},), got {tuple(vector.shape)}")
        total = self._total or self.sample_sum
        sums = total(vector.to(self.device, self.dtype), stratum).div_(self.total_weight)
        self._weight_differentiated += self._weight_here(stratum)
        if stratum is None:
            *forms, self.center_loss = sums[self.num_parameters :].tolist()
            self.forms = torch.tensor(forms, dtype=torch.float64)
        return sums[: self.num_parameters]

    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        r"""Return the sums over the samples of this process, or of one stratum, each with its weight.

        Returns:
            :math:`\sum_i w_i \nabla^2 \ell_i v`, then the part of each stratum in
            :math:`\sum_i w_i v^T \nabla^2 \ell_i v`, then :math:`\sum_i w_i \ell_i`; (P + S + 1,).

        Raises:
            ValueError: If it is not finite; names the batch whose loss is not.
            RuntimeError: If a layer has no second derivative.
        """
        parts = [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]
        wanted = (lambda origin: True) if stratum is None else lambda origin: origin % self.num_strata == stratum
        try:
            total = self._sum(parts, wanted)
        except _NoRoomForKept:
            self._products.release("memory ran out")
            total = self._sum(parts, wanted)
        if stratum is None and self._is_alone and not self.gradients.reaches:
            raise ValueError(
                "loss_fn: expected a loss that depends on the parameters; that of no batch has a graph of them"
            )
        # the sum is nan or inf if one of the entries is
        if not (bool(total.sum().isfinite()) or bool(total.isfinite().all())):
            for index, batch in enumerate(self._data):
                self._products.check_loss(index, batch)
            raise ValueError("loss_fn: expected a loss with finite second derivatives, got nan or inf in a product Hv")
        return total

    def _sum(self, parts: Sequence[Tensor], wanted: Callable[[int], bool]) -> Tensor:
        total = torch.zeros(self.num_parameters + self.num_strata + 1, dtype=self.dtype, device=self.device)
        in_parts = total[: self.num_parameters].split(self._sizes)
        places = [place.view(shape) for place, shape in zip(in_parts, self._shapes, strict=True)]
        forms, loss = total[self.num_parameters : -1], total[-1:]
        done = 0.0

        def product(index: int, batch: Batch) -> tuple[int, Product]:
            # by the batch it comes from: pieces of one that was cut draw the same numbers in every product
            origin = self._data.origins[index]
            if not self._products.is_kept(origin):
                return origin, self._products.product(origin, batch, parts)
            found = unless_out_of_memory(lambda: self._products.product(origin, batch, parts))
            if found is None:
                raise _NoRoomForKept
            return origin, found

        try:
            # the gradients copy each batch that they hand on
            for weight, (origin, found) in self._data.evaluate(product, wanted=wanted, copies=False):
                for place, row, part in zip(places, found.rows, parts, strict=True):
                    place.add_(row, alpha=weight)
                    forms[origin % self.num_strata].add_((row * part).sum(), alpha=weight)
                loss.add_(found.loss, alpha=weight)
                done += weight
                self._watch.has_value = True
        except TimeUp:
            # the batches are in the order of the samples
            num_samples = round(self.num_samples * done / self.total_weight)
            vector = torch.cat([part.reshape(-1) for part in parts])
            self.interrupted = InterruptedProduct(vector, total.div_(done), num_samples) if done else None
            raise
        return total

    def _weight_here(self, stratum: int | None) -> float:
        """Weight of the samples of this process, or of one of its strata."""
        return sum(self._batch_weights if stratum is None else self._batch_weights[stratum :: self.num_strata])


@dataclass(frozen=True, eq=False)
class InterruptedProduct:
    """The product of the Hessian of the first samples.

    Attributes:
        vector: What was multiplied with, (P,).
        sums: Product, forms and loss, as in `HessianOperator.sample_sum`, for the mean over these samples.
        num_samples: How many these are, as far as the weights tell.
    """

    vector: Tensor
    sums: Tensor
    num_samples: int


class _FirstValue(Progress):
    """Lets the time run out unnoticed until the product of one batch is there."""

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
    """There is no memory for a product beside what is kept."""
