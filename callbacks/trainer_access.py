"""The only file that touches what Lightning keeps to itself: bound to the Lightning versions in pyproject.toml."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.tensorboard.summary import hparams as hparams_summaries

__all__ = [
    "Split",
    "analysing",
    "datamodule_of",
    "forward_context",
    "is_sharded",
    "loader_of",
    "to_analysis_device",
    "write_hparams",
]

Split = Literal["train", "val", "test"]


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy spreads the parameters over processes, so that no process holds the model."""
    return isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))


def loader_of(trainer: Trainer, split: Split) -> Any | None:
    """The trainer's data loader (or collection of loaders) of a split, None where there is none.

    At the end of fit the loaders of training and validation are in place, unless their loops were skipped. That of the
    test split is asked of the data module, after the ``setup("test")`` that the Trainer itself would call, or of the
    module, whose ``setup`` is not called again: it may build the network.
    """
    if split == "train":
        return _set_up(trainer.train_dataloader, trainer.fit_loop._data_source)
    if split == "val":
        return _set_up(trainer.val_dataloaders, trainer.fit_loop.epoch_loop.val_loop._data_source)
    if trainer.test_dataloaders is not None:
        return trainer.test_dataloaders
    datamodule = datamodule_of(trainer)
    if datamodule is not None:
        if not is_overridden("test_dataloader", datamodule):
            return None
        datamodule.setup("test")
        return datamodule.test_dataloader()
    module = trainer.lightning_module
    return module.test_dataloader() if is_overridden("test_dataloader", module) else None


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The data module of this fit; the Trainer still knows that of an earlier one."""
    datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
    return datamodule if datamodule is trainer.fit_loop._data_source.instance else None


def forward_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """The precision, autocast say, in which the Trainer runs a forward pass."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.forward_context()
    return context


def _set_up(loaders: Any | None, source: Any) -> Any | None:
    """The loaders, or what their source gives where the loop that would have asked it was skipped."""
    if loaders is not None:
        return loaders
    return source.dataloader() if source.is_defined() else None


@contextmanager
def analysing(trainer: Trainer, pl_module: LightningModule) -> Iterator[torch.device]:
    """The module on its training device, its logging muted, the trainer in a stage that is not training.

    At the end of fit the strategy has moved the module to the CPU. The stage keeps augmentation in
    ``on_after_batch_transfer`` from firing. Everything is put back on leaving.

    Yields:
        The device.
    """
    home, stage = pl_module.device, trainer.state.stage
    device = trainer.strategy.root_device
    muted = dict.fromkeys(("log", "log_dict", "print"), _ignore)
    own = {name: vars(pl_module)[name] for name in muted if name in vars(pl_module)}
    try:
        vars(pl_module).update(muted)
        trainer.state.stage = RunningStage.VALIDATING
        pl_module.to(device)
        yield device
    finally:
        pl_module.to(home)
        trainer.state.stage = stage
        for name in muted:
            del vars(pl_module)[name]
        vars(pl_module).update(own)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, ``log_dict`` and ``print``."""


def to_analysis_device(trainer: Trainer, batch: Any) -> Any:
    """The batch on the training device, through the same hooks and in the same order as the Trainer's own loops."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def write_hparams(logger: TensorBoardLogger, hparams: dict[str, Any]) -> None:
    """One row of TensorBoard's HPARAMS table, with a column for every scalar that any run of the folder has.

    `TensorBoardLogger.log_hyperparams` would also write the list of columns, of which TensorBoard keeps one run's only:
    the columns of another head, and whatever is logged after fit, would be missing.
    """
    writer = logger.experiment._get_file_writer()
    _, session_start, session_end = hparams_summaries(hparams, {})
    writer.add_summary(session_start)
    writer.add_summary(session_end)
