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
from moe_heads.analysis.sharpness.hessian.difference_operator import DifferenceOperator
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import flat
from moe_heads.analysis.sharpness.hessian.gradient_differences import GradientDifferences, ShiftedGradient
from moe_heads.analysis.sharpness.hessian.loss_graph import checked_loss
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters

__all__ = ["WholeDifferences"]

# Largest relative difference of a loss in float64 from the same loss in float32 that rounding explains.
_SAME_LOSS = 1e-3


class WholeDifferences(DifferenceOperator):
    """Products by differences of gradients of a model that is whole in each process.

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
        self._gradients, self._cause = BatchGradients(model, loss_fn, named, seed), cause
        self._params = list(named.values())
        dtype = self._params[0].dtype
        self._double = self._double_loss(data) if in_double and dtype != torch.float64 else None
        dtype = dtype if self._double is None else torch.float64
        self._starts = [p.detach().to(dtype, copy=True) for p in self._params]
        size = math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in self._starts))
        num_parameters = sum(p.numel() for p in self._params)
        advice = f"There is no exact product instead: {cause}" if cause else ""
        super().__init__(named, data, GradientDifferences(size, dtype, tolerance, num_parameters), advice)

    @property
    @override
    def reason(self) -> str:
        kind = "" if self._double is None else " in float64"
        # without the remedy
        cause = f" ({self._cause.partition('. For the analysis')[0]})" if self._cause else ""
        return f"finite differences of gradients{kind} and no exact derivatives{cause}"

    @property
    @override
    def difference_weight(self) -> float:
        return self._weight_here(None)

    @override
    def _cut(self, vector: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]

    @override
    def _place(self, gradient: Tensor, total: Tensor) -> None:
        total.copy_(gradient)

    def _double_loss(self, data: Microbatches) -> DoubleLoss | None:
        """Return the loss in float64; None where it is not the same function, or cannot be evaluated."""
        gradients = self._gradients
        if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in gradients.model.parameters()):
            return None
        batch, origin = next(iter(data)), data.origins[0]
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

    @override
    def _loss_at_center(self) -> float:
        def evaluate(index: int, batch: Batch) -> float:
            return self._gradients.loss(self._data.origins[index], batch)

        return sum(weight * loss for weight, loss in self._data.evaluate(evaluate, copies=False))

    @override
    def _gradient_at(self, parts: list[Tensor], t: float, stratum: int | None) -> ShiftedGradient:
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

        evaluated = self._data.evaluate(evaluate, wanted=self.is_in(stratum), copies=False)
        for weight, (origin, loss, gradient) in evaluated:
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

    @override
    def _move_back(self) -> None:
        self._move(self._starts)

    def _move(self, values: Sequence[Tensor]) -> None:
        if self._double is None:
            for parameter, value in zip(self._params, values, strict=True):
                # Through ``data``, autograd does not count this as a change, which would make kept graphs unusable.
                parameter.data.copy_(value)
