"""The Hessian of a model whose parameters are divided among processes, by differences of gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.shards import Shards, local, reshard
from moe_heads.analysis.sharpness.hessian.difference_operator import DifferenceOperator
from moe_heads.analysis.sharpness.hessian.gradient_differences import GradientDifferences, ShiftedGradient
from moe_heads.analysis.sharpness.hessian.loss_graph import checked_loss
from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters

__all__ = ["ShardedDifferences"]


class ShardedDifferences(DifferenceOperator):
    """Products by differences of gradients of a sharded model.

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
        self._model, self._loss_fn, self._seed = model, on_copies(loss_fn), seed
        self._shards = Shards(named.values())
        self._parts = [local(p) for p in named.values()]
        self._starts = [part.detach().clone() for part in self._parts]
        squares = sum((part.square().sum(dtype=torch.float64) for part in self._starts), torch.zeros(()).double())
        first = self._parts[0]
        size = float(self._shards.all_reduce(squares.to(first.device)).sqrt())
        num_parameters = sum(p.numel() for p in named.values())
        differences = GradientDifferences(size, first.dtype, tolerance, num_parameters, self._shards.all_reduce)
        super().__init__(named, data, differences, remedy)

    @property
    @override
    def reason(self) -> str:
        return "products are differences of gradients"

    @property
    @override
    def difference_weight(self) -> float:
        return self.total_weight

    @override
    def _cut(self, vector: Tensor) -> list[Tensor]:
        return self._shards.cut(vector)

    @override
    def _place(self, gradient: Tensor, total: Tensor) -> None:
        own = gradient.split([part.numel() for part in self._parts])
        for place, row in zip(self._shards.cut(total), own, strict=True):
            place.copy_(row.view(place.shape))

    @override
    def _loss_at_center(self) -> float:
        with torch.no_grad():
            return self._sum_of_losses(None)

    @override
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

        evaluated = self._data.evaluate(evaluate, wanted=self.is_in(stratum), copies=False)
        return sum(weight * loss for weight, loss in evaluated)

    @override
    def _move_back(self) -> None:
        self._move(self._starts, 0.0)

    @torch.no_grad()
    def _move(self, parts: list[Tensor], t: float) -> None:
        reshard(self._model)
        for here, start, part in zip(self._parts, self._starts, parts, strict=True):
            torch.add(start, part, alpha=t, out=here)
