"""The Hessian of a model without second derivatives, by differences of gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import flat
from moe_heads.analysis.sharpness.hessian.gradient_differences import (
    GradientDifferences,
    ShiftedGradient,
    StepsDisagreeError,
)
from moe_heads.analysis.sharpness.hessian.loss_graph import checked_loss
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.hessian.products import GraphMode
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum

__all__ = ["WholeDifferences"]

# Largest relative difference of a loss in float64 from the same loss in float32 that rounding explains.
_SAME_LOSS = 1e-3


class WholeDifferences(WeightedSum):
    """The Hessian of a mean loss, as products by central differences of gradients; see `GradientDifferences`.

    For models whose layers have no second derivative. The gradients are those of a copy of the parameters in float64
    where the model can be evaluated in float64, and draws no random numbers. Then the steps are so short that they
    seldom cross the kink of a ReLU. Otherwise they are those of the model itself.

    Call this inside `analysis_mode`, which restores the parameters.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        data: The batches of this process.
        params: The parameters; by default all that require a gradient.
        tolerance: Largest relative difference between products with two steps.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.
        cause: Sentence that names the layer, for the error if the products with two steps differ.
        in_double: False for gradients of the model itself.

    Attributes:
        differences: The differences of gradients, with their errors.
        repeat_error: Relative difference of the loss when it is evaluated a second time; nan before the first product.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Microbatches,
        params: Selection | None = None,
        *,
        tolerance: float,
        seed: int = 0,
        cause: str = "",
        in_double: bool = True,
    ) -> None:
        named = selected_parameters(model, params)
        super().__init__(named, data)
        self._gradients, self._cause = BatchGradients(model, loss_fn, named, seed), cause
        self._params = list(named.values())
        self._double = self._double_loss() if in_double and self.dtype != torch.float64 else None
        dtype = self.dtype if self._double is None else torch.float64
        self._starts = [p.detach().to(dtype, copy=True) for p in self._params]
        size = math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in self._starts))
        self.differences = GradientDifferences(size, dtype, tolerance, self.num_parameters)
        self.repeat_error = math.nan
        self._center: float | None = None

    @property
    @override
    def mode(self) -> GraphMode:
        return "rebuilt"

    @property
    @override
    def reason(self) -> str:
        kind = "" if self._double is None else " in float64"
        # without the remedy
        cause = f" ({self._cause.partition('. For the analysis')[0]})" if self._cause else ""
        return f"finite differences of gradients{kind} and no exact derivatives{cause}"

    @property
    def difference_weight(self) -> float:
        """Weight of the samples of this process, which the errors of ``differences`` are sums over."""
        return self._weight_here(None)

    @override
    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the sums over the samples of this process; see `WeightedSum`.

        Raises:
            ValueError: If the loss is invalid, or the product depends on the step.
        """
        parts = [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]
        if self._center is None:
            self._center = self._loss_at_center()
        length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        try:
            found = self.differences.product(lambda t: self._gradient_at(parts, t, stratum), length)
        except StepsDisagreeError as error:
            cause = f" There is no exact product instead: {self._cause}" if self._cause else ""
            raise StepsDisagreeError(f"{error}{cause}") from None
        finally:
            self._move(self._starts)
        loss = found.gradient.new_tensor([self._center])
        return torch.cat([found.gradient, found.forms.to(found.gradient), loss]).to(self.dtype)

    def _double_loss(self) -> DoubleLoss | None:
        """Return the loss in float64; None where it is not the same function, or cannot be evaluated."""
        gradients = self._gradients
        if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in gradients.model.parameters()):
            return None
        batch, origin = next(iter(self._data)), self._data.origins[0]
        try:
            double = DoubleLoss(gradients.model, gradients.loss_fn, gradients.params)
            with gradients.random_numbers(origin):
                before = torch.get_rng_state()
                loss = double(batch, list(double.params.values()))
                if not torch.equal(before, torch.get_rng_state()):
                    return None
                if loss.requires_grad:
                    torch.autograd.grad(loss, list(double.params.values()), allow_unused=True)
            own = gradients.loss(origin, batch)
        except TimeUp:
            raise
        except Exception:  # any error of the user's code, which may not run in float64, or need too much memory there
            return None
        return double if abs(float(loss.detach()) - own) <= _SAME_LOSS * max(abs(own), 1e-30) else None

    def _loss_at_center(self) -> float:
        first, second = self._sum_of_losses(), self._sum_of_losses()
        self.repeat_error = abs(first - second) / max(abs(first), abs(second), 1e-300)
        return first

    def _sum_of_losses(self) -> float:
        def evaluate(index: int, batch: Batch) -> float:
            return self._gradients.loss(self._data.origins[index], batch)

        return sum(weight * loss for weight, loss in self._data.evaluate(evaluate, copies=False))

    def _gradient_at(self, parts: Sequence[Tensor], t: float, stratum: int | None) -> ShiftedGradient:
        moved = [start.add(part.to(start.dtype), alpha=t) for start, part in zip(self._starts, parts, strict=True)]
        direction = flat(parts).to(moved[0].dtype)
        total, total_loss = torch.zeros_like(direction), 0.0
        forms = torch.zeros(self.num_strata, dtype=direction.dtype, device=self.device)
        if self._double is None:
            self._move(moved)

        def evaluate(index: int, batch: Batch) -> tuple[int, float, Tensor]:
            origin = self._data.origins[index]
            loss, gradient = self._gradient(origin, batch, moved)
            return origin, loss, gradient

        wanted = (lambda origin: True) if stratum is None else lambda origin: origin % self.num_strata == stratum
        for weight, (origin, loss, gradient) in self._data.evaluate(evaluate, wanted=wanted, copies=False):
            total.add_(gradient, alpha=weight)
            forms[origin % self.num_strata].add_(gradient @ direction, alpha=weight)
            total_loss += weight * loss
        return ShiftedGradient(total, forms, total_loss)

    def _gradient(self, origin: int, batch: Batch, moved: Sequence[Tensor]) -> tuple[float, Tensor]:
        """Return loss and gradient of a batch at the moved parameters."""
        gradients = self._gradients
        with gradients.evaluation(origin):
            if self._double is None:
                params = self._params
                loss = checked_loss(gradients.loss_fn(gradients.model, batch), origin)
            else:
                params = [p.requires_grad_() for p in moved]
                loss = checked_loss(self._double(batch, params), origin)
            found: Sequence[Tensor] = [torch.zeros_like(p) for p in params]
            if loss.requires_grad:
                found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), flat(found)

    def _move(self, values: Sequence[Tensor]) -> None:
        if self._double is None:
            for parameter, value in zip(self._params, values, strict=True):
                # Through ``data``, autograd does not count this as a change, which would make kept graphs unusable.
                parameter.data.copy_(value)
