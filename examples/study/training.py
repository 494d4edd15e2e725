"""Training of a model of the study, in one or several processes."""

import time
from pathlib import Path

import torch
from lightning import pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

LAST = "last.ckpt"


class TimeIsUp(Exception):
    """Error raised when the time limit is exceeded; everything up to the last epoch or analysis is kept."""


class Deadline(Callback):
    """A time limit after which no epoch and no analysis starts.

    At least one of them starts, so that repeated processes with a short limit make progress.

    Args:
        at: `time.monotonic` of the end; infinity for no limit.

    Attributes:
        began: `time.perf_counter` of the last start; None before the first.
    """

    def __init__(self, at: float) -> None:
        self.at = at
        self.began: float | None = None

    def begin(self, done: str) -> None:
        """Start the next epoch or analysis.

        Args:
            done: Description of the finished parts.

        Raises:
            TimeIsUp: If the time limit is exceeded; its message is ``done``.
        """
        if self.began is not None and time.monotonic() > self.at:
            raise TimeIsUp(done)
        self.began = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin(f"trained {trainer.current_epoch} of {trainer.max_epochs} epochs")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin("trained, to be analyzed")


class TrainingClock(Callback):
    """Seconds of training, including validation, over all processes; saved in checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_over()
        self._since = None

    @override
    def state_dict(self) -> dict[str, float]:
        self._stop_over()
        return {"seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds = state_dict["seconds"]

    def _stop_over(self) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self.seconds, self._since = self.seconds + now - self._since, now


def checkpoints(folder: Path) -> ModelCheckpoint:
    """Return a callback that saves the last epoch as ``last.ckpt``, from which training can be resumed."""
    return ModelCheckpoint(
        folder,
        filename="last",
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint.

    Raises:
        RuntimeError: If the file cannot be read.
    """
    try:
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise RuntimeError(f"{path} is damaged: {error}. Remove it to train this run again.") from error
    return weights
