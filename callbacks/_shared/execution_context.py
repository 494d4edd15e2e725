"""Execution contexts of an analysis: a run of a Trainer, or a plain call without one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, to_device
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.progress import Show
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.state import preserved
from moe_heads.callbacks._shared.options import Weights
from moe_heads.callbacks._shared.progress_bar import progress_bar
from moe_heads.callbacks._shared.reporting import Report, log_report
from moe_heads.callbacks._shared.trainer_access import (
    Split,
    analyzing,
    best_weights,
    collective_timeout,
    datamodule_of,
    loader_of,
    muted,
    num_overfit_batches,
    process_group_of,
    to_analysis_device,
)

__all__ = ["ExecutionContext", "PlainContext", "TrainerContext"]

_DRY_RUN_SAMPLES = 16


class ExecutionContext(ABC):
    """Data, devices, processes and loggers that an analysis uses.

    Attributes:
        trainer: The trainer, or None.
    """

    trainer: Trainer | None = None

    @abstractmethod
    def ranks(self, name: str) -> Ranks:
        """Return the processes that work together."""

    @abstractmethod
    def prepared(self, model: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        """Move the model to its device, load the weights and set evaluation mode; restore everything at the end."""

    @abstractmethod
    def loader(self, split: Split, fallbacks: Sequence[Split]) -> tuple[Split, Any] | None:
        """Return the first of ``split`` and its fallbacks with data, and its loader or collection of loaders."""

    @abstractmethod
    def transfer(self, batch: Batch) -> Batch:
        """Move a batch to the device of the model."""

    def dataset(self, split: Split) -> Any | None:
        """Return the un-augmented data set of a split, if there is one."""
        return None

    def limits(self, split: Split, num_samples: int) -> tuple[int, int | None]:
        """Return the number of samples to draw, and the number of batches to draw them from (None for all)."""
        return num_samples, None

    def time_limit(self) -> float | None:
        """Return the seconds for which one rank may work while the others wait, None for no limit."""
        return None

    def progress(self, description: str) -> AbstractContextManager[Show]:
        """Show the progress of an analysis while the block runs."""
        return progress_bar(self.trainer, description)

    @abstractmethod
    def log(self, prefix: str, report: Report, *, is_known: bool) -> None:
        """Write a report; for a cached result, only restore the metrics that the Trainer has cleared."""


class TrainerContext(ExecutionContext):
    """Context of a run of a Trainer.

    Args:
        trainer: The trainer.
        owner: Name of the callback in messages.
    """

    trainer: Trainer

    def __init__(self, trainer: Trainer, owner: str) -> None:
        self.trainer, self._owner = trainer, owner

    @override
    def ranks(self, name: str) -> Ranks:
        return Ranks(process_group_of(self.trainer), name)

    @contextmanager
    @override
    def prepared(self, model: nn.Module, weights: Weights) -> Iterator[None]:
        assert isinstance(model, LightningModule)
        with torch.inference_mode(False), torch.enable_grad(), analyzing(self.trainer, model), preserved(model):
            # a dry run writes no checkpoint
            if weights == "best" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                best_weights(self.trainer, model)
            model.eval()
            yield

    @override
    def loader(self, split: Split, fallbacks: Sequence[Split]) -> tuple[Split, Any] | None:
        for candidate in (split, *fallbacks):
            found = loader_of(self.trainer, candidate)
            if found is not None:
                if candidate != split:
                    rank_zero_warn(f"{self._owner}: the trainer has no {split} data. Using {candidate} data instead.")
                return candidate, found
        rank_zero_warn(f"{self._owner}: the trainer has no {split} data. The split is skipped.")
        return None

    @override
    def transfer(self, batch: Batch) -> Batch:
        return to_analysis_device(self.trainer, batch)

    @override
    def dataset(self, split: Split) -> Any | None:
        offer = getattr(datamodule_of(self.trainer), "analysis_dataset", None)
        return None if offer is None else offer(split)

    @override
    def limits(self, split: Split, num_samples: int) -> tuple[int, int | None]:
        # a dry run executes everything on few samples
        is_dry = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        num_batches = num_overfit_batches(self.trainer) if split == "train" else None
        return min(num_samples, _DRY_RUN_SAMPLES) if is_dry else num_samples, num_batches

    @override
    def time_limit(self) -> float | None:
        return collective_timeout(self.trainer) / 2 if self.trainer.world_size > 1 else None

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool) -> None:
        log_report(self.trainer, prefix, report, to_loggers=not is_known)


class PlainContext(ExecutionContext):
    """Context of a plain call without a Trainer.

    Args:
        loaders: Loader, or collection of loaders, by split.
        device: Device of the analysis; None for the device of the model.

    Raises:
        ValueError: If it is a CUDA device and CUDA is not available.
    """

    def __init__(self, loaders: Mapping[Split, Any], device: torch.device | str | None) -> None:
        self._loaders = {split: _Batches(given) if _is_batches(given) else given for split, given in loaders.items()}
        self._device = None if device is None else torch.device(device)
        if self._device is not None and self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected an available device, got {device!r}. CUDA is not available.")
        self._model: nn.Module | None = None

    @override
    def ranks(self, name: str) -> Ranks:
        return Ranks(name=name)

    @contextmanager
    @override
    def prepared(self, model: nn.Module, weights: Weights) -> Iterator[None]:
        if weights == "best":
            raise MisconfigurationException(
                "weights: expected 'last' without a Trainer, got 'best'. Load the best checkpoint into the model first."
            )
        home = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self._device, self._model = self._device or home, model
        with torch.inference_mode(False), torch.enable_grad(), preserved(model), muted(model):
            try:
                model.to(self._device).eval()
                yield
            finally:
                with HeldInterrupts():
                    model.to(home)

    @override
    def loader(self, split: Split, fallbacks: Sequence[Split]) -> tuple[Split, Any] | None:
        return split, self._loaders[split]

    @override
    def transfer(self, batch: Batch) -> Batch:
        assert self._device is not None
        if not isinstance(self._model, LightningModule):
            return to_device(batch, self._device)
        batch = self._model.on_before_batch_transfer(batch, 0)
        batch = self._model.transfer_batch_to_device(batch, self._device, 0)
        return self._model.on_after_batch_transfer(batch, 0)

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool) -> None:
        """Do nothing: there is no logger."""


class _Batches:
    """A list of batches, wrapped so that it is not mistaken for a list of loaders."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _is_batches(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and not any(isinstance(part, DataLoader) for part in given)
