"""The Hessian of a model whose parameters are divided among processes, by differences of gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.shards import Shards, local, reshard
from moe_heads.analysis.sharpness.hessian.gradient_differences import (
    GradientDifferences,
    ShiftedGradient,
    StepsDisagreeError,
)
from moe_heads.analysis.sharpness.hessian.loss_graph import checked_loss
from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters
from moe_heads.analysis.sharpness.hessian.products import GraphMode
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum

__all__ = ["DifferenceOperator"]


class DifferenceOperator(WeightedSum):
    """The Hessian of a mean loss, as products by central differences of gradients; see `GradientDifferences`.

    Each process moves its parts of the parameters and keeps its parts of the gradients, so a product takes three times
    the memory of a part, in addition to two whole vectors: v and the sum of the parts of Hv. The parts of a sharded
    model (FSDP2) are evaluated by all processes in step, each on its samples. FSDP2 adds up their gradients. A model
    that is not sharded works too.

    Call this inside `analysis_mode`, which restores the parameters and their ``.grad``.

    Args:
        model: The model. All parameters that require a gradient are differentiated.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        data: The batches of this process.
        tolerance: Largest relative difference between products with two steps.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.
        remedy: Sentence at the end of the error if the products with two steps differ.

    Attributes:
        differences: The differences of gradients, with their errors.
        repeat_error: Relative difference of the loss when it is evaluated a second time; nan before the first product.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Microbatches,
        *,
        tolerance: float,
        seed: int = 0,
        remedy: str = "",
    ) -> None:
        named = selected_parameters(model, None, allows_shards=True)
        super().__init__(named, data)
        self._model, self._loss_fn, self._seed, self._remedy = model, on_copies(loss_fn), seed, remedy
        self._shards = Shards(named.values())
        self._parts = [local(p) for p in named.values()]
        self._starts = [part.detach().clone() for part in self._parts]
        squares = sum((part.square().sum(dtype=torch.float64) for part in self._starts), torch.zeros(()).double())
        size = float(self._shards.all_reduce(squares.to(self.device)).sqrt())
        self.differences = GradientDifferences(
            size, self.dtype, tolerance, self.num_parameters, self._shards.all_reduce
        )
        self.repeat_error = math.nan
        self._center: float | None = None

    @property
    @override
    def mode(self) -> GraphMode:
        return "rebuilt"

    @property
    @override
    def reason(self) -> str:
        return "products are differences of gradients"

    @override
    def sample_sum(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the parts of this process in the sums over the samples of all processes; see `WeightedSum`.

        Raises:
            ValueError: If the loss is invalid, or the product depends on the step.
        """
        parts = self._shards.cut(vector)
        length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        if self._center is None:
            self._center = self._loss_at_center()
        try:
            found = self.differences.product(lambda t: self._gradient_at(parts, t, stratum), length)
        except StepsDisagreeError as error:
            raise StepsDisagreeError(f"{error} {self._remedy}".rstrip()) from None
        finally:
            self._move(parts, 0.0)
        total = torch.zeros(self.num_parameters + self.num_strata + 1, dtype=self.dtype, device=self.device)
        places = self._shards.cut(total[: self.num_parameters])
        own = found.gradient.split([part.numel() for part in self._parts])
        for place, row in zip(places, own, strict=True):
            place.copy_(row.view(place.shape))
        total[self.num_parameters : -1] = found.forms
        total[-1] = self._center
        return total

    def _loss_at_center(self) -> float:
        with torch.no_grad():
            first, second = self._sum_of_losses(None), self._sum_of_losses(None)
        self.repeat_error = abs(first - second) / max(abs(first), abs(second), 1e-300)
        return first

    def _gradient_at(self, parts: list[Tensor], t: float, stratum: int | None) -> ShiftedGradient:
        self._move(parts, t)
        direction = torch.cat([part.reshape(-1) for part in parts])
        total = torch.zeros_like(direction)
        forms = torch.zeros(self.num_strata, dtype=self.dtype, device=self.device)

        def add_gradient(loss: Tensor, weight: float, origin: int) -> None:
            self._shards.clear_gradients()
            if loss.requires_grad:
                # FSDP2 averages the gradients over the processes
                (loss * (weight * self._shards.num_processes)).backward()
            gradient = torch.cat([part.reshape(-1) for part in self._shards.gradients()])
            total.add_(gradient)
            forms[origin % self.num_strata].add_(gradient @ direction)

        loss = self._sum_of_losses(stratum, add_gradient)
        return ShiftedGradient(total, forms, loss)

    def _sum_of_losses(
        self, stratum: int | None, use: Callable[[Tensor, float, int], None] = lambda loss, weight, origin: None
    ) -> float:
        """Return the weighted sum of the losses of this process.

        Args:
            stratum: Number of the stratum; None for all of the data.
            use: Called with the loss, weight and original index of each batch.
        """

        def evaluate(index: int, batch: Batch) -> float:
            weight, origin = self._data.weights[index], self._data.origins[index]
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(self._seed + origin)
                loss = checked_loss(self._loss_fn(self._model, batch), origin)
                use(loss, weight, origin)
            return float(loss.detach())

        wanted = (lambda origin: True) if stratum is None else lambda origin: origin % self.num_strata == stratum
        evaluated = self._data.evaluate(evaluate, wanted=wanted, copies=False)
        return sum(weight * loss for weight, loss in evaluated)

    @torch.no_grad()
    def _move(self, parts: list[Tensor], t: float) -> None:
        reshard(self._model)
        for here, start, part in zip(self._parts, self._starts, parts, strict=True):
            torch.add(start, part, alpha=t, out=here)
