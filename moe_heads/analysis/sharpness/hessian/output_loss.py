"""Mean loss as a function of the outputs of a model, which a Gauss-Newton matrix needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy

__all__ = ["OutputLoss", "OutputLossFn", "Outputs", "OutputsFn"]

OutputsFn = Callable[[nn.Module, Batch], Any]
"""``outputs_fn(model, batch) -> outputs``: the tensor that the loss is computed from, such as logits."""

OutputLossFn = Callable[[Any, Batch], Any]
"""``output_loss(outputs, batch) -> scalar``: the mean loss over the samples of the batch."""


class Outputs(NamedTuple):
    """Outputs of a model, and the loss as a function of them.

    Attributes:
        outputs: The outputs, with a graph to the parameters.
        point: The same values as a leaf.
        loss: The loss, with a graph to ``point``.
    """

    outputs: Tensor
    point: Tensor
    loss: Tensor


@dataclass(frozen=True)
class OutputLoss:
    r"""A loss :math:`\ell(f(\theta))` with outputs f and a loss :math:`\ell` of the outputs as separate functions.

    It is itself a ``loss_fn(model, batch)``.

    Attributes:
        outputs_fn: ``outputs_fn(model, batch) -> outputs``, a floating-point tensor of any shape.
        output_loss: ``output_loss(outputs, batch) -> scalar``, the mean over the samples of the batch. It must not use
            the model.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import OutputLoss
        >>> loss_fn = OutputLoss(lambda model, batch: model(batch), lambda outputs, batch: outputs.square().mean())
        >>> float(loss_fn(torch.nn.Identity(), torch.ones(2)))
        1.0
    """

    outputs_fn: OutputsFn
    output_loss: OutputLossFn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.output_loss(_checked(self.outputs_fn(model, batch)), batch)
        return loss

    def separate(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return outputs and loss of a batch with separate graphs.

        Raises:
            ValueError: If the outputs are not a floating-point tensor.
        """
        batch = own_copy(batch)
        outputs = _checked(self.outputs_fn(model, batch))
        point = outputs.detach().requires_grad_()
        return Outputs(outputs, point, self.output_loss(point, batch))


def _checked(outputs: object) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        return outputs
    got = f"a tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"outputs_fn: expected a floating-point tensor, got {got}. Return the tensor that the loss is computed from,"
        " such as the logits."
    )
