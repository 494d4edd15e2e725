"""Classifier with a backbone and a head, trained with the settings of arXiv 2601.15021."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from typing_extensions import override

from moe_heads import Head, Router, capacity, collect_routing
from moe_heads.checks import (
    check_at_least_one,
    check_flags,
    check_not_negative,
    check_option,
    check_positive,
    check_shares,
)
from moe_heads.lightning_modules.schedules import SCHEDULES, Schedule, schedule_config

__all__ = ["MoEClassifier"]

Batch = tuple[Tensor, Tensor]
"""Inputs (B, …) and class labels (B,), int64."""


class MoEClassifier(LightningModule):
    """LightningModule of a backbone and a head, trained by SGD on the cross-entropy plus the balance loss of the head.

    It works with any head from features to logits: those of ``moe_heads``, a plain `torch.nn.Linear`, or a module that
    contains heads at any depth. The objective includes the balance losses of all of them and of heads inside the
    backbone.

    It logs once per epoch, as means over the samples: ``train/loss`` (the objective: cross-entropy with label smoothing
    plus balance loss), ``train/aux_loss`` (the balance part), and ``train/accuracy``. For validation and test it logs
    ``val/loss`` (plain cross-entropy in nats), ``val/accuracy`` (fraction of correct samples) and
    ``val/calibration_error`` (expected calibration error, 15 bins).

    Args:
        backbone: Module from inputs to features.
        head: Module from features to logits (B, C).
        learning_rate: Initial learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: L2 coefficient on all parameters.
        nesterov: Whether to use Nesterov momentum.
        schedule: "cosine" lowers the learning rate to 0 over ``max_epochs`` of the trainer, one step per epoch.
            "linear" raises it in the first fifth of the training and then lowers it to 0, one step per batch, which is
            suited to few epochs. "constant" keeps it.
        label_smoothing: Label smoothing of the training cross-entropy, in [0, 1).
        channels_last: Whether to store the convolutions of the backbone and the images with the channels last.
            Convolutions in bf16, and those on a CPU, are faster in this format. The values change by rounding only.
        num_classes: C. None takes it from ``num_classes`` or ``out_features`` of the head.

    Attributes:
        num_classes: C.

    Raises:
        ValueError: If an argument is out of range, the number of classes is unknown or contradicts the head, or the
            head does not match ``num_features`` of the backbone.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.lightning_modules import DigitsCNN, MoEClassifier
        >>> model = MoEClassifier(DigitsCNN(), SparseMoE(64, 10), learning_rate=0.05)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        schedule: Schedule = "cosine",
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("head", head)):
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"{name}: expected a torch.nn.Module, got {module!r}. A checkpoint contains only weights: call"
                    " load_from_checkpoint(path, backbone=..., head=...)."
                )
        check_positive(learning_rate=learning_rate)
        check_shares(momentum=momentum, label_smoothing=label_smoothing)
        check_not_negative(weight_decay=weight_decay)
        check_flags(nesterov=nesterov, channels_last=channels_last)
        if nesterov and momentum == 0:
            raise ValueError("nesterov: expected False with momentum 0, got True. Set a momentum above 0.")
        check_option("schedule", schedule, SCHEDULES)
        _check_sizes(backbone, head)
        self.num_classes = _num_classes(head, num_classes)
        self.backbone = backbone.to(memory_format=torch.channels_last) if channels_last else backbone
        self.head = head
        # without modules and the entries of LightningCLI: the table of runs and load_from_checkpoint need scalars
        self.save_hyperparameters(ignore=["backbone", "head", "_instantiator", "_class_path"])
        # load_from_checkpoint cannot read NumPy scalars, which a sweep may pass
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in self.hparams.items()}
        self.save_hyperparameters(plain | _describe(backbone, head))
        self._head_returns_all = isinstance(head, Head) and not any(isinstance(m, Router) for m in backbone.modules())
        self.train_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.val_calibration_error = MulticlassCalibrationError(self.num_classes, n_bins=15)
        self.test_calibration_error = MulticlassCalibrationError(self.num_classes, n_bins=15)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, C)."""
        logits: Tensor = self.head(self._features(x))
        return logits

    @override
    def setup(self, stage: str) -> None:
        """Check that the data module, if it has ``num_classes``, has as many classes as the head.

        Raises:
            ValueError: If ``trainer.datamodule.num_classes`` differs from that of the head.
        """
        expected = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if expected != self.num_classes:
            raise ValueError(
                f"head: expected {expected} classes, the number of the data module, got {self.num_classes}. Build the"
                f" head with num_classes={expected}."
            )

    @override
    def on_fit_start(self) -> None:
        """Check that the weights are finite and the training data is not empty.

        Raises:
            ValueError: If a weight is not finite, or the training loader is empty.
        """
        for name, parameter in self.named_parameters():
            if not isinstance(parameter, nn.UninitializedParameter) and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"weights: expected finite numbers before training, got nan or infinity in {name}. Check the"
                    " initialization or the loaded checkpoint."
                )
        self.trainer.fit_loop.setup_data()
        if self.trainer.num_training_batches == 0 and self.trainer.limit_train_batches != 0:
            raise ValueError(
                "train loader: expected at least one batch, got an empty loader. Check the data set, the batch size and"
                " drop_last."
            )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the cross-entropy plus the balance loss, scalar, without synchronizing with the host."""
        x, labels = batch
        logits, aux_loss = self._logits_and_aux_loss(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"]) + aux_loss
        self.train_accuracy(logits.detach(), labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels), "sync_dist": True}
        self.log("train/loss", loss.detach(), prog_bar=True, **options)
        self.log("train/aux_loss", aux_loss.detach(), **options)
        self.log("train/accuracy", self.train_accuracy, **options)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and calibration error of a validation batch.

        Raises:
            ValueError: If logits are not finite in the sanity check before training.
        """
        self._evaluate("val", batch, self.val_accuracy, self.val_calibration_error)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, accuracy and calibration error of a test batch."""
        self._evaluate("test", batch, self.test_accuracy, self.test_calibration_error)

    @override
    def configure_optimizers(self) -> Any:
        """Build SGD and its schedule.

        Raises:
            MisconfigurationException: If the schedule depends on the length of the training and it is infinite.
        """
        options = {name: self.hparams[name] for name in ("momentum", "weight_decay", "nesterov")}
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], **options)
        if self.hparams["schedule"] == "constant":
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": schedule_config(self.hparams["schedule"], optimizer, self.trainer),
        }

    def analysis_loss(self, batch: Batch) -> Tensor:
        """Compute the mean cross-entropy of a batch, scalar, nats: the loss that the analyses differentiate.

        It includes neither balance loss nor label smoothing, so that heads can be compared.
        """
        return self.analysis_output_loss(self.analysis_outputs(batch), batch)

    def analysis_outputs(self, batch: Batch) -> Tensor:
        """Compute the logits of a batch, (B, C), the outputs of which the Gauss-Newton matrix is taken."""
        logits: Tensor = self(batch[0])
        return logits

    def analysis_output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute `analysis_loss` from the logits."""
        return F.cross_entropy(outputs, batch[1])

    def analysis_accuracy(self, batch: Batch) -> Tensor:
        """Compute the fraction of correct samples of a batch, scalar."""
        x, labels = batch
        accuracy: Tensor = (self(x).argmax(-1) == labels).float().mean()
        return accuracy

    def _features(self, x: Tensor) -> Tensor:
        if self.hparams["channels_last"] and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(x)
        return features

    def _logits_and_aux_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._head_returns_all:
            logits, aux_loss, _ = self.head(self._features(x), return_routing=True)
            return logits, aux_loss
        with collect_routing(self) as routing:
            logits = self(x)
        return logits, logits.new_zeros(()) + routing.aux_loss

    def _evaluate(
        self, split: str, batch: Batch, accuracy: MulticlassAccuracy, calibration: MulticlassCalibrationError
    ) -> None:
        x, labels = batch
        logits = self(x)
        if self.trainer.sanity_checking:
            _check_finite(logits)
        accuracy(logits, labels)
        # as probabilities: torchmetrics treats logits that all happen to be in [0, 1] as probabilities
        calibration(logits.softmax(-1), labels)
        metrics: dict[str, Metric | Tensor] = {
            f"{split}/loss": F.cross_entropy(logits, labels),
            f"{split}/accuracy": accuracy,
            f"{split}/calibration_error": calibration,
        }
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)


def _check_sizes(backbone: nn.Module, head: nn.Module) -> None:
    came, expected = getattr(backbone, "num_features", None), getattr(head, "in_features", None)
    if isinstance(came, int) and isinstance(expected, int) and came != expected:
        raise ValueError(
            f"head: expected in_features={came}, the num_features of the backbone, got {expected}. Build the head with"
            f" in_features={came}."
        )


def _num_classes(head: nn.Module, num_classes: int | None) -> int:
    known = getattr(head, "num_classes", getattr(head, "out_features", None))
    if num_classes is None:
        if not isinstance(known, int):
            raise ValueError(
                f"num_classes: expected a number, since {type(head).__name__} has neither num_classes nor out_features,"
                " got None. Pass num_classes=C."
            )
        return known
    check_at_least_one(num_classes=num_classes)
    if isinstance(known, int) and known != num_classes:
        raise ValueError(f"num_classes: expected {known}, the number of logits of the head, got {num_classes}.")
    return num_classes


def _describe(backbone: nn.Module, head: nn.Module) -> dict[str, str | int | float]:
    """Return the hyperparameters that distinguish the models in a table of runs."""
    size = capacity(head)
    shape = {name: getattr(head, name, None) for name in ("num_experts", "k", "expert_width", "width")}
    router = getattr(head, "router", None)
    return {
        "backbone": type(backbone).__name__,
        "head": type(head).__name__,
        **({"router": type(router).__name__} if isinstance(router, Router) else {}),
        **{name: value for name, value in shape.items() if isinstance(value, (int, float))},
        "num_head_params": size.total,
        "num_active_head_params": size.active,
    }


def _check_finite(logits: Tensor) -> None:
    num_bad = int((~logits.isfinite().all(-1)).sum())
    if num_bad:
        raise ValueError(
            f"logits: expected finite numbers from the model, got nan or infinity in {num_bad} of {len(logits)} rows "
            "of a validation batch before training. Check the inputs and the initial or loaded weights."
        )
