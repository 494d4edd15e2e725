"""What an analysis evaluates of any LightningModule: its loss, or its forward pass."""

from collections.abc import Mapping
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from moe_heads.callbacks.functional.batches import Batch, ForwardFn, LossFn

__all__ = ["check_forward", "loss_of"]


def loss_of(pl_module: LightningModule, loss_fn: LossFn | None) -> LossFn:
    """The loss of a module, in the order of preference.

    1. ``loss_fn(pl_module, batch)``, the callback's argument;
    2. the module's own ``analysis_loss(batch)``;
    3. what ``training_step`` returns, a tensor or a dict with "loss", under automatic optimisation.

    Args:
        pl_module: The module.
        loss_fn: The callback's argument.

    Returns:
        ``loss_fn(pl_module, batch) -> scalar``.

    Raises:
        MisconfigurationException: If the module optimises by hand and offers neither of the first two: calling its
            training step would change the weights.
    """
    if loss_fn is not None:
        return loss_fn
    if hasattr(pl_module, "analysis_loss"):
        return lambda model, batch: cast(Any, model).analysis_loss(batch)
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimises by hand, so its training_step would change the weights. Pass"
            " loss_fn=lambda model, batch: ... to the callback, or give the module a method analysis_loss(batch)."
        )
    return _training_loss


def check_forward(callback: Callback, pl_module: LightningModule, forward_fn: ForwardFn | None) -> None:
    """Refuse a module that cannot be called, before training.

    Raises:
        MisconfigurationException: If the module has no ``forward`` and no ``forward_fn`` takes its place.
    """
    if forward_fn is None and type(pl_module).forward is LightningModule.forward:
        raise MisconfigurationException(
            f"{type(callback).__name__} calls the module, and {type(pl_module).__name__} has no forward. Define it, or"
            " pass forward_fn=lambda module, batch: ... to the callback."
        )


def _training_loss(model: nn.Module, batch: Batch) -> Tensor:
    step = cast(LightningModule, model).training_step
    # the Trainer's own rule: a second argument, whatever its name, is the index of the batch
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{type(model).__name__}.training_step: expected a tensor or a dict with 'loss'; got {type(loss).__name__}."
            " Pass loss_fn=lambda model, batch: ... to the callback, or give the module a method analysis_loss(batch)."
        )
    return loss
