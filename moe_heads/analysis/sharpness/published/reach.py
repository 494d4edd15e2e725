"""Parameters on which PyHessian stops with an error: those that are idle, and those that enter the loss linearly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian.loss_graph import checked_loss

__all__ = ["Reach"]


@dataclass(frozen=True)
class Reach:
    """The parameters on which PyHessian stops with an error, by name.

    Attributes:
        idle: Those that no gradient reaches in some batch.
        linear: Those whose gradient in some batch is a constant.
    """

    idle: tuple[str, ...]
    linear: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: LossFn, data: Sequence[Batch], params: dict[str, Tensor], progress: Progress
    ) -> "Reach":
        """Look at the gradient of each batch."""
        idle: set[str] = set()
        linear: set[str] = set()
        for index, batch in enumerate(data):
            progress.tick()
            loss = checked_loss(loss_fn(model, batch), index)
            gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
            idle.update(name for name, g in zip(params, gradient, strict=True) if g is None)
            linear.update(name for name, g in zip(params, gradient, strict=True) if g is not None and g.grad_fn is None)
        ordered = (
            tuple(name for name in params if name in idle),
            tuple(name for name in params if name in linear - idle),
        )
        return cls(*ordered)

    def failures(self) -> list[str]:
        """A sentence for each kind."""
        sentences = []
        remedy = "; 0·‖p‖² was added to the loss, which changes nothing else"
        if self.idle:
            sentences.append(
                f"idle parameter: no gradient reaches {_listed(self.idle)} in at least one batch, which crashes"
                f" PyHessian 0.1 (it takes the missing gradient for the number 0){remedy}"
            )
        if self.linear:
            sentences.append(
                f"linear parameter: the gradient by {_listed(self.linear)} is constant in at least one batch, which"
                f" crashes PyHessian 0.1 (it differentiates the constant){remedy}"
            )
        return sentences


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
