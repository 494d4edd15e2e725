"""Loss and gradient of a model at perturbed weights."""

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis.sharpness.perturbation.weights import PerturbedWeights

__all__ = ["PerturbedLosses"]


class PerturbedLosses:
    """This rank's part of the loss and of its gradient at perturbed weights."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, data: Microbatches, weights: PerturbedWeights, seed: int
    ) -> None:
        self._model, self._loss_fn, self._data = model, on_copies(loss_fn), data
        self._weights, self._seed = weights, seed
        self._graph = GraphOnDemand()

    def at_draw(self, message: Tensor) -> Tensor:
        """Weighted sum of the losses, sum of the weights, number of samples, (3,), at a draw of a seed and factor."""
        draw, scale = message.tolist()
        self._weights.go(self._weights.normal(int(draw)), scale)
        total = torch.tensor([0, 0, self._data.num_samples], dtype=torch.float64)
        losses = self._data.evaluate(lambda index, batch: self._loss(index, batch, at_center=scale == 0), copies=False)
        for weight, loss in losses:
            total[:2] += torch.tensor([weight * loss, weight], dtype=torch.float64)
        return total.to(message.device)

    def at_point(self, u: Tensor) -> Tensor:
        """Weighted sum of the gradients by u and of the losses, and sum of the weights, (P + 2,), float64."""
        at_center = not bool(u.any())
        self._weights.go(self._weights.parts(u))
        total = torch.zeros(len(u) + 2, dtype=torch.float64, device=u.device)
        parts = self._weights.parts(total[:-2])
        found = self._data.evaluate(lambda index, batch: self._both(index, batch, at_center), copies=False)
        for weight, (loss, gradient) in found:
            for part, by_parameter in zip(parts, gradient, strict=True):
                part.add_(by_parameter.reshape(-1), alpha=weight)
            total[-2:] += torch.tensor([weight * loss, weight], dtype=torch.float64, device=u.device)
        self._weights.scale_(parts)
        return total

    def _loss(self, index: int, batch: Batch, at_center: bool) -> float:
        return self._graph(lambda: float(self._evaluated(index, batch, at_center).detach()), compares=at_center)

    def _evaluated(self, index: int, batch: Batch, at_center: bool) -> Tensor:
        torch.manual_seed(self._seed + self._data.origins[index])  # the numbers that the loss draws in the Hessian
        return _checked(self._loss_fn(self._model, batch), index, at_center)

    def _both(self, index: int, batch: Batch, at_center: bool) -> tuple[float, tuple[Tensor, ...]]:
        loss = self._evaluated(index, batch, at_center)
        if not loss.requires_grad:
            raise ValueError(
                f"loss_fn: expected a loss that depends on the model's parameters; that of batch {index} does not"
            )
        found = torch.autograd.grad(loss, self._weights.params, allow_unused=True, materialize_grads=True)
        # an embedding called as a function may have a sparse gradient
        gradient = tuple(part if part.layout == torch.strided else part.to_dense() for part in found)
        if at_center and not all(bool(part.isfinite().all()) for part in gradient):
            raise ValueError(f"loss_fn: expected a finite gradient, got nan or inf in that of batch {index}")
        return float(loss.detach()), gradient


def _checked(loss: object, index: int, at_center: bool) -> Tensor:
    """The loss of batch ``index``; away from the center it may be nan or inf."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected a scalar tensor, the mean loss of batch {index}, got {got}")
    if at_center and not bool(loss.isfinite().all()):
        raise ValueError(
            f"loss_fn: expected a finite loss of the model as it is, got {loss.item()} as the loss of batch {index}"
        )
    return loss.reshape(())
