"""Products with a weighted sum over the batches of all processes, in parts of the data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis.sharpness.hessian.parameters import slices_of
from moe_heads.analysis.sharpness.hessian.products import GraphMode, Matrix

__all__ = ["InterruptedProduct", "WeightedSum"]

# On a ResNet-8 sixteen strata reduce the variance of the trace's samples 3 to 9 times. Each costs a random vector.
_MOST_STRATA = 16


@dataclass(frozen=True, eq=False)
class InterruptedProduct:
    """Product with the Hessian of the first samples.

    Attributes:
        vector: The multiplied vector, (P,).
        sums: Product, forms and loss, as in `WeightedSum.sample_sum`, for the mean over these samples.
        num_samples: Number of these samples, estimated from the weights.
    """

    vector: Tensor
    sums: Tensor
    num_samples: int


class WeightedSum(ABC):
    r"""The Hessian of a weighted mean of batch losses, given by the sums of its products over batches.

    Args:
        named: The parameters by name.
        data: The batches of this process.

    Attributes:
        names: Names of the parameters, in the order of the flat vector.
        slices: Place of each parameter in the flat vector, by name.
        num_samples: N.
        total_weight: Sum of the weights of the batches, by which the products are divided: N by default.
        num_strata: Number of parts of the data with separate products: the batches, or groups of them, at most 16.
        stratum_weights: Share of each part in the data, which sum to 1, (S,), float64.
        forms: :math:`v^T H_s v` of each part and the vector of the last product with the whole; they sum to
            :math:`v^T H v`.
        center_loss: Mean loss over the data, from the differentiated graph; nan before the first product.
        interrupted: The finished part of a product that the end of the time interrupted.
        matrix: The matrix.
    """

    matrix: Matrix = "hessian"

    def __init__(self, named: Mapping[str, Tensor], data: Microbatches) -> None:
        self.names = tuple(named)
        first, *_ = named.values()
        self.dtype, self.device = first.dtype, first.device
        self.slices = slices_of(named)
        self._shapes = [p.shape for p in named.values()]
        self._sizes = [p.numel() for p in named.values()]
        self.num_parameters = sum(self._sizes)
        self._data = data
        self._batch_weights = list(data.weights)
        self.num_strata = min(len(data), _MOST_STRATA)
        self.num_samples, self.total_weight = data.num_samples, data.total_weight
        self._weight_differentiated = 0.0
        self._total: Callable[[Tensor, int | None], Tensor] | None = None  # this process alone
        self._is_alone = True
        self.forms = torch.zeros(self.num_strata, dtype=torch.float64)
        self.stratum_weights = self.own_stratum_weights() / self.total_weight
        self.center_loss = math.nan
        self.interrupted: InterruptedProduct | None = None

    @abstractmethod
    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        r"""Return the sums over the samples of this process, or of one stratum, each with its weight.

        Returns:
            :math:`\sum_i w_i \nabla^2 \ell_i v`, then the part of each stratum in
            :math:`\sum_i w_i v^T \nabla^2 \ell_i v`, then :math:`\sum_i w_i \ell_i`; (P + S + 1,).
        """

    @property
    @abstractmethod
    def mode(self) -> GraphMode:
        """Way of computing a product: "kept" or "rebuilt"."""

    @property
    @abstractmethod
    def reason(self) -> str:
        """Reason why a faster way was not used; "" if there is none."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.num_parameters, self.num_parameters

    @property
    def num_products(self) -> int:
        """Number of products so far. Those with single strata count by their share of the samples."""
        return math.ceil(self._weight_differentiated / self._weight_here(None) - 1e-9)

    @property
    def data(self) -> Microbatches:
        """The samples of this process."""
        return self._data

    def own_stratum_weights(self) -> Tensor:
        """Return the weight of the samples of this process in each stratum, (S,), float64."""
        return torch.tensor([self._weight_here(s) for s in range(self.num_strata)], dtype=torch.float64)

    def over_ranks(
        self,
        total: Callable[[Tensor, int | None], Tensor] | None,
        *,
        num_samples: int,
        stratum_weights: Tensor,
    ) -> None:
        """Multiply with the Hessian of all ranks' samples from now on.

        Args:
            total: The sum of ``sample_sum(v, stratum)`` over the ranks; None on a rank that only adds its part.
            num_samples: Number of samples of all ranks.
            stratum_weights: Sum of the weights over the ranks by stratum, with the largest number of strata of a rank.
        """
        self._total, self.num_samples, self._is_alone = total, num_samples, False
        self.num_strata, self.total_weight = len(stratum_weights), float(stratum_weights.sum())
        self.stratum_weights = stratum_weights / self.total_weight

    def is_in(self, stratum: int | None) -> Callable[[int], bool]:
        """Return a function that tells whether the batch of an index is in a stratum, or in the data for None."""
        return lambda origin: stratum is None or origin % self.num_strata == stratum

    def release(self) -> None:
        """Release the other ranks, and whatever is kept between products."""
        self._total = None

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product :math:`Hv`, or a stratum's part of it. The parts of all strata sum to the product.

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

    def _weight_here(self, stratum: int | None) -> float:
        """Return the weight of the samples of this process, or of one of its strata."""
        return sum(self._batch_weights if stratum is None else self._batch_weights[stratum :: self.num_strata])
