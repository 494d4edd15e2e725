"""Loss of a Trainer of transformers, and the number of labels that it is a mean over."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.generators import generators_kept

__all__ = ["TransformersLoss", "has_own_loss"]

_IGNORED = -100

# Relative change of a loss by the order of a sum on a GPU.
_ROUNDING = 1e-6


def has_own_loss(trainer: Trainer) -> bool:
    """Return whether a subclass of the Trainer computes the loss."""
    return type(trainer).compute_loss is not Trainer.compute_loss


class TransformersLoss:
    """``loss_fn(model, batch)`` of a Trainer: `compute_loss`, with which it also trains.

    So label smoothing, ``compute_loss_func`` and an overridden ``compute_loss`` are used. The last two may divide by
    ``num_items_in_batch``. They receive the number of labels of the batch. The model's own loss divides by it anyway.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._needs_count = trainer.compute_loss_func is not None or has_own_loss(trainer)
        self._shifts_labels: bool | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = self._labels(batch) if self._needs_count else None
        return self._loss(model, batch, None if labels is None else _count(labels))

    def weight(self, batch: Batch) -> float:
        """Return the number of labels of a batch that the loss is a mean over; without labels, that of its samples."""
        labels = self._labels(batch)
        return batch_size(batch) if labels is None else int(_count(labels))

    def _loss(self, model: nn.Module, batch: Batch, count: Tensor | None) -> Tensor:
        with self._of_this_process():
            loss: Tensor = self._trainer.compute_loss(model, batch, num_items_in_batch=count)
            return loss

    @contextmanager
    def _of_this_process(self) -> Iterator[None]:
        """Prevent that the loss is scaled for a later mean over the processes."""
        arguments = vars(self._trainer.args)
        before = arguments["average_tokens_across_devices"]
        try:
            arguments["average_tokens_across_devices"] = False
            yield
        finally:
            arguments["average_tokens_across_devices"] = before

    def _labels(self, batch: Batch) -> Tensor | None:
        """Return the labels that the loss uses, ignored ones included, or None."""
        if not isinstance(batch, Mapping):
            return None
        shifted, labels = batch.get("shift_labels"), batch.get("labels")
        if isinstance(shifted, Tensor):
            return shifted
        if not isinstance(labels, Tensor):
            return None
        is_of_tokens = labels.dim() == 2 and not labels.is_floating_point()
        return labels[:, 1:] if is_of_tokens and self._shifts(batch, labels) else labels

    def _shifts(self, batch: Batch, labels: Tensor) -> bool:
        """Return whether the first label of a sample is not used, since token n predicts label n + 1."""
        if self._shifts_labels is None:
            self._shifts_labels = self._measured_shift(batch, labels)
        return _has_causal_loss(self._trainer.model) if self._shifts_labels is None else self._shifts_labels

    def _measured_shift(self, batch: Batch, labels: Tensor) -> bool | None:
        """Change the first labels and return whether the loss stays the same; None if they cannot be changed.

        The name of a model does not decide it: GPT-2 shifts its labels, and XLNet does not.
        """
        first, values = labels[:, 0], labels[labels != _IGNORED].unique()
        if len(values) < 2 or bool(first.eq(_IGNORED).all()):
            return None
        # other labels of the batch, since the model may know no others
        others = torch.where(first == values[0], values[1], values[0])
        changed = labels.clone()
        changed[:, 0] = torch.where(first == _IGNORED, first, others)
        losses = []
        with generators_kept(), torch.no_grad():
            for each in (labels, changed):
                torch.manual_seed(0)
                varied = own_copy(batch)
                varied["labels"] = each.clone()
                losses.append(float(self._loss(self._trainer.model, varied, _count(labels))))
        return abs(losses[0] - losses[1]) <= _ROUNDING * abs(losses[0])


def _count(labels: Tensor) -> Tensor:
    return labels.ne(_IGNORED).sum()


def _has_causal_loss(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_causal = getattr(inner, "loss_function", None) is ForCausalLMLoss
    return is_causal and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
