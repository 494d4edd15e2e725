"""Training a model of the study, in as many pieces as it takes."""

import time
from pathlib import Path

import torch
from lightning import pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from moe_heads.callbacks import FitEndAnalysis

LAST = "last.ckpt"


class TimeIsUp(Exception):
    """The time of this piece is over; everything up to the last epoch is kept."""


class Deadline(Callback):
    """Begins no epoch, and no analysis at the end of fit, once the time of this process is over.

    Args:
        at: `time.monotonic` of the end; infinity for none.

    Attributes:
        fit_ended: `time.perf_counter` of the end of fit, before the analyses.
    """

    def __init__(self, at: float) -> None:
        self.at = at
        self.fit_ended = float("nan")
        self._has_begun = False

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # one epoch at least, else a short time would never lead anywhere; its predecessor is on the disk by now
        if self._has_begun and time.monotonic() > self.at:
            raise TimeIsUp(f"trained {trainer.current_epoch} of {trainer.max_epochs} epochs")
        self._has_begun = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # after a piece that did nothing but load what was trained before, there is a whole piece's time
        if self._has_begun and time.monotonic() > self.at:
            raise TimeIsUp("trained, to be analysed")
        self.fit_ended = time.perf_counter()


class TrainingClock(Callback):
    """Seconds of training, validation included, over all pieces; kept in the checkpoints."""

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
    """The last epoch's weights as ``last.ckpt``, all that it takes to carry on; no other file."""
    return ModelCheckpoint(
        folder,
        filename="last",
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def checked(path: Path) -> Path:
    """A checkpoint that can be read.

    Raises:
        RuntimeError: Names the file that cannot, and what to do.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RuntimeError(f"{path} is damaged ({error}); remove it to train this run anew") from error
    return path


def missing(analyses: list[FitEndAnalysis]) -> list[str]:
    """Names of the analyses that are not whole."""
    return [
        analysis.name
        for analysis in analyses
        if set(analysis.results) != set(analysis.splits) or any(r.partial for r in analysis.results.values())
    ]
