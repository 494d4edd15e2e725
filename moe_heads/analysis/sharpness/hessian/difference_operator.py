"""The Hessian as an operator whose products are central differences of gradients."""

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis.sharpness.hessian.gradient_differences import (
    GradientDifferences,
    ShiftedGradient,
    StepsDisagreeError,
)
from moe_heads.analysis.sharpness.hessian.products import GraphMode
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum

__all__ = ["DifferenceOperator"]


class DifferenceOperator(WeightedSum):
    """The Hessian of a mean loss, as products by central differences of gradients; see `GradientDifferences`.

    Args:
        named: The parameters by name.
        data: The batches of this process.
        differences: The differences of gradients.
        advice: End of the error if the products with two steps differ.

    Attributes:
        differences: The differences of gradients, with their errors.
        repeat_error: Relative difference of the loss when it is evaluated a second time; nan before the first product.
    """

    def __init__(
        self, named: Mapping[str, Tensor], data: Microbatches, differences: GradientDifferences, advice: str
    ) -> None:
        super().__init__(named, data)
        self.differences, self._advice = differences, advice
        self.repeat_error = math.nan
        self._center: float | None = None

    @property
    @override
    def mode(self) -> GraphMode:
        return "rebuilt"

    @property
    @abstractmethod
    def difference_weight(self) -> float:
        """Weight of the samples that the errors of ``differences`` are sums over."""

    @override
    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the sums over the samples; see `WeightedSum`.

        Raises:
            ValueError: If the loss is invalid, or the product depends on the step.
        """
        parts = self._cut(vector)
        length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        if self._center is None:
            first, second = self._loss_at_center(), self._loss_at_center()
            self.repeat_error = abs(first - second) / max(abs(first), abs(second), 1e-300)
            self._center = first
        try:
            found = self.differences.product(lambda t: self._gradient_at(parts, t, stratum), length)
        except StepsDisagreeError as error:
            raise StepsDisagreeError(f"{error} {self._advice}".rstrip()) from None
        finally:
            self._move_back()
        total = torch.zeros(self.num_parameters + self.num_strata + 1, dtype=self.dtype, device=self.device)
        self._place(found.gradient, total[: self.num_parameters])
        total[self.num_parameters : -1] = found.forms
        total[-1] = self._center
        return total

    @abstractmethod
    def _cut(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a flat vector that this process moves the parameters by."""

    @abstractmethod
    def _gradient_at(self, parts: list[Tensor], t: float, stratum: int | None) -> ShiftedGradient:
        """Return the gradient with the parameters moved by t times the parts."""

    @abstractmethod
    def _move_back(self) -> None:
        """Restore the parameters."""

    @abstractmethod
    def _loss_at_center(self) -> float:
        """Return the weighted sum of the losses of this process."""

    @abstractmethod
    def _place(self, gradient: Tensor, total: Tensor) -> None:
        """Write the gradient of this process into a flat vector of zeros, (P,)."""
