"""Losses that exist in training mode only: a torchvision detector returns detections in evaluation mode."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis._shared.scalar import is_scalar

__all__ = ["explain_evaluation_mode"]


def explain_evaluation_mode(model: nn.Module, loss_fn: LossFn, batch: Batch, error: Exception) -> None:
    """Raise an error with a remedy if the loss fails in evaluation mode but not in training mode.

    Args:
        model: The module.
        loss_fn: Its loss.
        batch: A batch of the sample.
        error: The error of the loss in evaluation mode.

    Raises:
        MisconfigurationException: If the loss is a scalar in training mode.
    """
    if is_out_of_memory(error) or not _has_loss_in_training_mode(model, loss_fn, batch):
        return
    raise MisconfigurationException(
        f"{type(model).__name__}: expected a loss in evaluation mode, got {type(error).__name__}: {error}. In training"
        " mode there is one. Define analysis_loss(batch) that calls self.train(), sets the batch norm and dropout"
        ' layers to evaluation mode, and returns the loss: see "Analyze a detector" in docs/how_to.md.'
    ) from error


def _has_loss_in_training_mode(model: nn.Module, loss_fn: LossFn, batch: Batch) -> bool:
    with analysis_mode(model):
        model.train()
        for module in model.modules():
            if isinstance(module, (_NormBase, _DropoutNd)):
                module.eval()
        try:
            loss = loss_fn(model, own_copy(batch))
        except Exception:  # of any kind: then the mode is not the cause
            return False
    return is_scalar(loss)
