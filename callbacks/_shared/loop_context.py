"""Execution context of a training loop without a Lightning Trainer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.loggers.logger import Logger
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks._shared.custom_scalars import Charts
from moe_heads.callbacks._shared.plain_context import ListedBatches, PlainContext
from moe_heads.callbacks._shared.reporting import Report, log_charts, log_figures, log_report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LoopContext"]


class LoopContext(PlainContext):
    """Context of a training loop that calls the events of its analyses itself.

    Args:
        owner: Name of the loop's object in messages.
        analyses: The analyses.
        loggers: The loggers, used on rank zero.
        loss_fn: Loss of analyses without one of their own; None for that of the model.
        device: Device of the analyses; None for the device of the model.

    Attributes:
        step: Number of optimizer steps so far.
        epoch: Number of the current epoch, from 0.
        optimizers: The optimizers, none if they are unknown.
        metrics: The last value of every number, by key.
        group: Process group of the training, None for a single process.
        batch: The last training batch. It stands for the training data if there are none.
    """

    is_training_run = True
    optimizers: Sequence[Optimizer] = ()

    def __init__(
        self,
        owner: str,
        analyses: Sequence[TrainingAnalysis],
        loggers: Sequence[Logger] = (),
        loss_fn: LossFn | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__({}, device)
        self.owner, self.loss_fn = owner, loss_fn
        self.step = self.epoch = 0
        self.metrics: dict[str, float] = {}
        self.group: dist.ProcessGroup | None = None
        self.batch: Batch = None
        self._analyses, self._loggers = tuple(analyses), tuple(loggers)

    @property
    @override
    def analyses(self) -> Sequence[TrainingAnalysis]:
        return self._analyses

    @property
    @override
    def is_rank_zero(self) -> bool:
        return self.group is None or dist.get_rank(self.group) == 0

    @override
    def ranks(self, name: str) -> Ranks:
        return Ranks(self.group, name)

    @override
    def loader_of(self, split: Split) -> Any | None:
        found = super().loader_of(split)
        if found is None and split == "train" and self.batch is not None:
            return ListedBatches([self.batch], f"the training batch of step {self.step}")
        return found

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool = False) -> None:
        self.metrics.update(report.keyed(prefix))
        if self.is_rank_zero and not is_known:
            log_report(self._loggers, prefix, report, self.step)

    @override
    def log_epoch(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        self.metrics.update(numbers)
        if self.is_rank_zero:
            for logger in self._loggers:
                # a Lightning Trainer counts the steps of an epoch's numbers from zero
                logger.log_metrics(dict(numbers), step=max(self.step - 1, 0))

    @override
    def log_figures(self, prefix: str, draw: "Callable[[], Mapping[str, Figure]]") -> None:
        if self.is_rank_zero:
            log_figures(self._loggers, prefix, draw, self.step)

    @override
    def log_charts(self, title: str, charts: Charts) -> None:
        if self.is_rank_zero:
            log_charts(self._loggers, title, charts)
