"""Execution context of a call without a Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, to_device
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.state import preserved
from moe_heads.callbacks._shared.custom_scalars import Charts
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.lightning_packages import under_both_names
from moe_heads.callbacks._shared.options import Weights
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split, muted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ListedBatches", "PlainContext"]


class PlainContext(ExecutionContext):
    """Context of a plain call without a Trainer and without loggers.

    Args:
        loaders: Loader, or collection of loaders, by split.
        device: Device of the analysis; None for the device of the model.

    Raises:
        ValueError: If it is a CUDA device and CUDA is not available.
    """

    is_training_run = False
    step = epoch = 0

    def __init__(self, loaders: Mapping[Split, Any], device: torch.device | str | None = None) -> None:
        self.give(loaders)
        self._device = None if device is None else torch.device(device)
        if self._device is not None and self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected an available device, got {device!r}. CUDA is not available.")
        self._model: nn.Module | None = None

    def give(self, loaders: Mapping[Split, Any]) -> None:
        """Set the loader, or collection of loaders, of each split; None for none."""
        self._loaders = {
            split: ListedBatches(given) if _is_batches(given) else given for split, given in loaders.items()
        }

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
    def loader_of(self, split: Split) -> Any | None:
        return self._loaders.get(split)

    @override
    def transfer(self, batch: Batch) -> Batch:
        assert self._device is not None
        model: Any = self._model
        if not isinstance(model, under_both_names(LightningModule)):
            return to_device(batch, self._device)
        batch = model.on_before_batch_transfer(batch, 0)
        batch = model.transfer_batch_to_device(batch, self._device, 0)
        return model.on_after_batch_transfer(batch, 0)

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool = False) -> None:
        """Do nothing: there is no logger."""

    @override
    def log_epoch(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        """Do nothing: there is no logger."""

    @override
    def log_figures(self, prefix: str, draw: "Callable[[], Mapping[str, Figure]]") -> None:
        """Do nothing: there is no logger."""

    @override
    def log_charts(self, title: str, charts: Charts) -> None:
        """Do nothing: there is no logger."""


class ListedBatches:
    """A list of batches, wrapped so that it is not mistaken for a list of loaders.

    Args:
        batches: The batches.
        origin: Their origin, for the report.
    """

    def __init__(self, batches: Sequence[Batch], origin: str = "batches as given") -> None:
        self._batches, self.origin = batches, origin

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _is_batches(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and not any(isinstance(part, DataLoader) for part in given)
