"""Execution contexts of an analysis: what an analysis needs of the loop that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchWeightFn
from moe_heads.analysis._shared.progress import Show
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks._shared.custom_scalars import Charts
from moe_heads.callbacks._shared.options import Weights
from moe_heads.callbacks._shared.progress_bar import progress_bar
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ExecutionContext"]


class ExecutionContext(ABC):
    """Data, devices, processes and loggers of an analysis, and the state of the training that it follows.

    Attributes:
        owner: Name of the analysis in messages.
        trainer: The Lightning Trainer, None in any other loop.
        is_training_run: Whether the analyses follow a training. False for a plain call.
        loss_fn: Loss of analyses without one of their own; None for that of the model.
        batch_weight_fn: Weight of the loss of a batch, for analyses without a function of their own; None for the
            number of samples.
        announces_validation: Whether the loop announces its validation batches. Otherwise passes in evaluation mode are
            ignored.
        shows_labels: Whether the batches of the training have their labels when an analysis gets them.
    """

    owner: str = "analysis"
    trainer: Trainer | None = None
    is_training_run: bool = True
    announces_validation: bool = False
    shows_labels: bool = True
    loss_fn: LossFn | None = None
    batch_weight_fn: BatchWeightFn | None = None

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of optimizer steps so far."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""

    @property
    def analyses(self) -> Sequence[Any]:
        """Every `TrainingAnalysis` of the run, in their order."""
        return ()

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers of the training, none if they are unknown."""
        return ()

    @property
    def class_names(self) -> Any:
        """The class names that the data know, or None. They are not checked."""
        return None

    @property
    def is_rank_zero(self) -> bool:
        """True in the process that writes to the loggers."""
        return True

    @abstractmethod
    def ranks(self, name: str) -> Ranks:
        """Return the processes that work together."""

    @abstractmethod
    def prepared(self, model: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        """Move the model to its device, load the weights and set evaluation mode; restore everything at the end."""

    def full_precision(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which the parameters of a model have the precision that a loss needs."""
        return nullcontext()

    @property
    def batch_index(self) -> int:
        """Index of the training batch in its epoch, where the loop has one; else 0."""
        return 0

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context in which the loop runs a forward pass, such as autocast."""
        return nullcontext()

    def loader(self, split: Split, fallbacks: Sequence[Split]) -> tuple[Split, Any] | None:
        """Return the first of ``split`` and its fallbacks with data, and its loader or collection of loaders."""
        for candidate in (split, *fallbacks):
            found = self.loader_of(candidate)
            if found is not None:
                if candidate != split:
                    rank_zero_warn(f"{self.owner}: there are no {split} data. Using {candidate} data instead.")
                return candidate, found
        rank_zero_warn(f"{self.owner}: there are no {split} data. The split is skipped.")
        return None

    @abstractmethod
    def loader_of(self, split: Split) -> Any | None:
        """Return the loader or collection of loaders of a split, or None."""

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
    def log(self, prefix: str, report: Report, *, is_known: bool = False) -> None:
        """Write a report; for a cached result, only restore the metrics that the loop has cleared."""

    @abstractmethod
    def log_epoch(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a training epoch, which are equal on all ranks."""

    @abstractmethod
    def log_figures(self, prefix: str, draw: "Callable[[], Mapping[str, Figure]]") -> None:
        """Draw and write figures during training if a logger shows figures."""

    @abstractmethod
    def log_charts(self, title: str, charts: Charts) -> None:
        """Add a group of charts to the page of custom scalars."""
