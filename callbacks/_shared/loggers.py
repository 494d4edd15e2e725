"""Loggers of a training loop without a Trainer: those of Lightning or Fabric, a SummaryWriter, or a W&B run."""

import sys
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from moe_heads.callbacks._shared.lightning_packages import under_both_names

__all__ = ["loggers_of"]


def loggers_of(writer: Any) -> list[Logger]:
    """Return loggers for what a user writes the numbers of a training to.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, a W&B run, a logger of Lightning or Fabric, a list of these,
            or None.

    Raises:
        ValueError: If it is anything else.

    Example:
        >>> from lightning.fabric.loggers import CSVLogger
        >>> from moe_heads.callbacks._shared.loggers import loggers_of
        >>> len(loggers_of([CSVLogger("runs")])), loggers_of(None)
        (1, [])
    """
    if writer is None:
        return []
    if isinstance(writer, (list, tuple)):
        return [logger for each in writer for logger in loggers_of(each)]
    if isinstance(writer, under_both_names(Logger)):  # type: ignore[type-abstract]
        return [writer]
    if isinstance(writer, SummaryWriter):
        return [_OfWriter(writer)]
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and isinstance(writer, wandb.Run):
        return [WandbLogger(experiment=writer)]
    raise ValueError(
        "writer: expected a torch.utils.tensorboard.SummaryWriter, a W&B run, a logger of Lightning or Fabric, a list"
        f" of these, or None, got {type(writer).__name__}."
    )


class _OfWriter(TensorBoardLogger):
    """Logger that writes with the user's SummaryWriter."""

    def __init__(self, writer: SummaryWriter) -> None:
        super().__init__(writer.log_dir, name="", version="")
        self._experiment = writer

    @property
    @override
    def log_dir(self) -> str:
        assert self._experiment is not None
        return str(self._experiment.log_dir)
