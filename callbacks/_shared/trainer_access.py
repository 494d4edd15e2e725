"""Access to private parts of Lightning, in this file only; it depends on the Lightning versions in pyproject.toml."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.overrides import is_overridden as is_overridden_in
from torch import nn
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.callbacks._shared.lightning_packages import own_class, under_both_names

__all__ = [
    "Split",
    "analyzing",
    "best_weights",
    "collective_timeout",
    "datamodule_of",
    "forward_context",
    "has_default_hp_metric",
    "inner_sampler",
    "inside_fabric",
    "is_model_parallel",
    "is_overridden",
    "is_sharded",
    "loader_of",
    "mode_of",
    "muted",
    "num_overfit_batches",
    "process_group_of",
    "tensor_parallel_size",
    "to_analysis_device",
    "uncombined",
    "write_hparams",
]

Split = Literal["train", "val", "test"]


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the strategy shards the parameters, so that no process holds the whole model."""
    return isinstance(trainer.strategy, under_both_names(DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))


def is_overridden(name: str, owner: nn.Module | LightningDataModule) -> bool:
    """Return whether a LightningModule or LightningDataModule has its own version of a method; False for others."""
    parent: type | None = own_class(owner, LightningModule) or own_class(owner, LightningDataModule)
    return parent is not None and is_overridden_in(name, owner, parent)


def is_model_parallel(trainer: Trainer) -> bool:
    """Return whether the strategy leaves it to the module to divide its parameters (FSDP2, DTensor)."""
    return isinstance(trainer.strategy, under_both_names(ModelParallelStrategy))


def tensor_parallel_size(trainer: Trainer) -> int:
    """Return the number of processes that share the layers of a `ModelParallelStrategy`."""
    size = getattr(trainer.strategy, "_tensor_parallel_size", 1)
    return size if isinstance(size, int) else trainer.strategy.num_processes  # type: ignore[attr-defined]


def loader_of(trainer: Trainer, split: Split) -> Any | None:
    """Return the trainer's data loader (or collection of loaders) of a split, or None.

    At the end of fit, the loaders of training and validation exist unless their loops were skipped. The test loader
    comes from the data module or from the module. The ``setup`` of the module is not called again, since it may build
    the network.
    """
    found = _any_loader_of(trainer, split)
    return None if isinstance(found, (list, tuple, dict)) and not found else found


def _any_loader_of(trainer: Trainer, split: Split) -> Any | None:
    if split == "train":
        together = trainer.fit_loop._combined_loader
        if together is not None and isinstance(together.iterables, (list, tuple, dict)) and together.iterables:
            return together  # it holds the mode in which its loaders are combined
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
    """Return the test loader, calling ``setup("test")`` only if necessary, since it may split the data again."""
    try:
        loader = datamodule.test_dataloader()
    except Exception:  # of any kind: the data are not set up yet
        loader = None
    if loader is not None and getattr(loader, "dataset", loader) is not None:
        return loader
    datamodule.setup("test")
    return datamodule.test_dataloader()


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the data module of this fit; ``trainer.datamodule`` may belong to an earlier one."""
    datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
    return datamodule if datamodule is trainer.fit_loop._data_source.instance else None


def forward_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return the context in which the Trainer runs a forward pass, such as autocast."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.forward_context()
    return context


def _set_up(loaders: Any | None, source: Any) -> Any | None:
    """Return the loaders, or those of their source if the loop that sets them up was skipped."""
    if loaders is not None:
        return loaders
    return source.dataloader() if source.is_defined() else None


@contextmanager
def analyzing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Move the module to its training device, mute its logging, and set a stage other than training.

    At the end of fit, the strategy has moved the module to the CPU. The stage disables augmentation in
    ``on_after_batch_transfer``. Writes to ``self.logger`` are discarded. Everything is restored when the block ends.
    """
    home, stage, should_stop = pl_module.device, trainer.state.stage, trainer.should_stop
    try:
        trainer.state.stage = RunningStage.VALIDATING
        # autocast stays off, but in double precision new tensors have to be doubles
        plugin = trainer.precision_plugin
        sets_dtype = isinstance(plugin, under_both_names(DoublePrecision, HalfPrecision))
        dtype = plugin.forward_context() if sets_dtype else nullcontext()
        with muted(pl_module), dtype:
            pl_module.to(trainer.strategy.root_device)
            yield
    finally:
        with HeldInterrupts():
            trainer.state.stage, trainer.should_stop = stage, should_stop
            pl_module.to(home)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Disable ``log``, ``log_dict``, ``print`` and the loggers of all LightningModules in a module."""
    silent: list[Any] = [child for child in module.modules() if isinstance(child, under_both_names(LightningModule))]
    kinds = under_both_names(Trainer)
    trainers = {id(child._trainer): child._trainer for child in silent if isinstance(child._trainer, kinds)}
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
    """Replace ``log``, ``log_dict`` and ``print`` by no operation."""


def best_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Load the best checkpoint of the run into the module, as ``trainer.test(ckpt_path="best")`` would.

    Raises:
        MisconfigurationException: If there is no best checkpoint.
    """
    kinds = under_both_names(ModelCheckpoint)
    checkpoints: list[Any] = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, kinds)]
    checkpoints.sort(key=lambda checkpoint: checkpoint.monitor is None)  # the first that monitors something
    path = next((checkpoint.best_model_path for checkpoint in checkpoints if checkpoint.best_model_path), "")
    if not path:
        raise MisconfigurationException(
            "weights='best': expected a run with a best checkpoint, got none. Give the Trainer a"
            " ModelCheckpoint(monitor=...) that saves at least once, or analyze weights='last'."
        )
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)  # this run's own file
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


def process_group_of(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return the process group of the trainer's processes, None for a single process."""
    return dist.group.WORLD if trainer.world_size > 1 and dist.is_available() and dist.is_initialized() else None


def collective_timeout(trainer: Trainer) -> float:
    """Return the timeout in seconds of a rank that waits for the others."""
    timeout = getattr(trainer.strategy, "_timeout", None) or timedelta(minutes=30)
    return float(timeout.total_seconds())


def num_overfit_batches(trainer: Trainer) -> int | None:
    """Return the number of training batches selected by ``overfit_batches``, None for all."""
    if not trainer.overfit_batches or math.isinf(trainer.num_training_batches):  # type: ignore[attr-defined]
        return None
    return int(trainer.num_training_batches)


def to_analysis_device(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the training device through the same hooks, in the same order, as the Trainer's own loops."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def inside_fabric(wrapped: Any) -> Any | None:
    """Return the module, optimizer or data loader that Fabric has wrapped, None for any other object."""
    if isinstance(wrapped, under_both_names(_FabricModule)):
        return wrapped._forward_module
    if isinstance(wrapped, under_both_names(_FabricOptimizer)):
        return wrapped.optimizer
    return wrapped._dataloader if isinstance(wrapped, under_both_names(_FabricDataLoader)) else None


def write_hparams(logger: TensorBoardLogger, hparams: dict[str, Any]) -> None:
    """Write one row of TensorBoard's HPARAMS table, with a column for every scalar of any run in the folder.

    `TensorBoardLogger.log_hyperparams` would also write the list of columns, and TensorBoard keeps the list of one run
    only. The columns of another head, and scalars that are logged after fit, would be missing.
    """
    writer = logger.experiment._get_file_writer()
    _, session_start, session_end = hparams_summaries(hparams, {})
    writer.add_summary(session_start)
    writer.add_summary(session_end)


def has_default_hp_metric(logger: TensorBoardLogger) -> bool:
    """Return whether the logger writes a row of hyperparameters of its own, which would hide the other metrics."""
    return bool(logger._default_hp_metric)


def mode_of(loaders: Any) -> str:
    """Return how a `CombinedLoader` combines its loaders, and how the Trainer combines a plain collection."""
    return str(loaders._mode) if isinstance(loaders, under_both_names(CombinedLoader)) else "max_size_cycle"


def uncombined(loaders: Any) -> Any:
    """Return the collection of loaders in a `CombinedLoader`, and anything else unchanged."""
    return loaders.iterables if isinstance(loaders, under_both_names(CombinedLoader)) else loaders


def inner_sampler(sampler: Any) -> Any:
    """Return the user's sampler, which Lightning wraps into a distributed one under DDP."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
