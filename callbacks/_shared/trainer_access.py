"""The only file that touches what Lightning keeps to itself: bound to the Lightning versions in pyproject.toml."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from moe_heads.analysis._shared.interrupts import HeldInterrupts

__all__ = [
    "Split",
    "analyzing",
    "best_weights",
    "collective_timeout",
    "datamodule_of",
    "forward_context",
    "is_sharded",
    "loader_of",
    "muted",
    "num_overfit_batches",
    "process_group_of",
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
    test split is asked of the data module, or of the module, whose ``setup`` is not called again: it may build the
    network.
    """
    found = _any_loader_of(trainer, split)
    return None if isinstance(found, (list, tuple, dict)) and not found else found


def _any_loader_of(trainer: Trainer, split: Split) -> Any | None:
    if split == "train":
        together = trainer.fit_loop._combined_loader
        if together is not None and isinstance(together.iterables, (list, tuple, dict)) and together.iterables:
            return together  # which knows how its loaders are combined
        return _set_up(trainer.train_dataloader, trainer.fit_loop._data_source)
    if split == "val":
        return _set_up(trainer.val_dataloaders, trainer.fit_loop.epoch_loop.val_loop._data_source)
    if trainer.test_dataloaders is not None:
        return trainer.test_dataloaders
    datamodule = datamodule_of(trainer)
    if datamodule is not None:
        if not is_overridden("test_dataloader", datamodule):
            return None
        return _test_loader(datamodule)
    module = trainer.lightning_module
    return module.test_dataloader() if is_overridden("test_dataloader", module) else None


def _test_loader(datamodule: LightningDataModule) -> Any:
    """The test loader; after ``setup("test")`` only where there is none without, since it may split the data anew."""
    try:
        loader = datamodule.test_dataloader()
    except Exception:  # of any kind: the data are not there yet
        loader = None
    if loader is not None and getattr(loader, "dataset", loader) is not None:
        return loader
    datamodule.setup("test")
    return datamodule.test_dataloader()


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
def analyzing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The module on its training device, its logging muted, the trainer in a stage that is not training.

    At the end of fit the strategy has moved the module to the CPU. The stage keeps augmentation in
    ``on_after_batch_transfer`` from firing. What the module writes to ``self.logger`` goes nowhere. Everything is put
    back on leaving.
    """
    home, stage, should_stop = pl_module.device, trainer.state.stage, trainer.should_stop
    try:
        trainer.state.stage = RunningStage.VALIDATING
        # autocast is left out, but in a model of doubles new tensors have to be doubles
        plugin = trainer.precision_plugin
        dtype = plugin.forward_context() if isinstance(plugin, (DoublePrecision, HalfPrecision)) else nullcontext()
        with muted(pl_module), dtype:
            pl_module.to(trainer.strategy.root_device)
            yield
    finally:
        with HeldInterrupts():
            trainer.state.stage, trainer.should_stop = stage, should_stop
            pl_module.to(home)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """``log``, ``log_dict``, ``print`` and the loggers do nothing, of the module and of modules of its kind inside."""
    silent = [child for child in module.modules() if isinstance(child, LightningModule)]
    trainers = {id(child._trainer): child._trainer for child in silent if isinstance(child._trainer, Trainer)}
    loggers = {key: (trainer.loggers, dict(trainer.callback_metrics)) for key, trainer in trainers.items()}
    names = ("log", "log_dict", "print")
    own = [{name: vars(child)[name] for name in names if name in vars(child)} for child in silent]
    try:
        for child in silent:
            vars(child).update(dict.fromkeys(names, _ignore))
        for trainer in trainers.values():
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield
    finally:
        with HeldInterrupts():
            for child, before in zip(silent, own, strict=True):
                for name in names:
                    vars(child).pop(name, None)
                vars(child).update(before)
            for key, trainer in trainers.items():
                trainer.loggers, metrics = loggers[key]
                trainer.callback_metrics.clear()
                trainer.callback_metrics.update(metrics)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, ``log_dict`` and ``print``."""


def best_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Load the best checkpoint of the run into the module, as ``trainer.test(ckpt_path="best")`` would.

    Raises:
        MisconfigurationException: If the run has none.
    """
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    checkpoints.sort(key=lambda checkpoint: checkpoint.monitor is None)  # the first that monitors something
    path = next((checkpoint.best_model_path for checkpoint in checkpoints if checkpoint.best_model_path), "")
    if not path:
        raise MisconfigurationException(
            "weights='best': the run has written no best checkpoint. Give the Trainer a ModelCheckpoint(monitor=...)"
            " that saves at least once, or analyze weights='last'."
        )
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)  # this run's own file
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


def process_group_of(trainer: Trainer) -> dist.ProcessGroup | None:
    """The process group over which the trainer's processes talk; None for a single process."""
    return dist.group.WORLD if trainer.world_size > 1 and dist.is_available() and dist.is_initialized() else None


def collective_timeout(trainer: Trainer) -> float:
    """Seconds after which a rank that waits for the others gives up."""
    timeout = getattr(trainer.strategy, "_timeout", None) or timedelta(minutes=30)
    return float(timeout.total_seconds())


def num_overfit_batches(trainer: Trainer) -> int | None:
    """Batches of the training data that ``overfit_batches`` leaves, None for all of them."""
    if not trainer.overfit_batches or math.isinf(trainer.num_training_batches):  # type: ignore[attr-defined]
        return None
    return int(trainer.num_training_batches)


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
