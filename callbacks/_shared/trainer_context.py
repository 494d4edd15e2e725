"""Execution context of a run of a Lightning Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.state import preserved
from moe_heads.callbacks._shared import trainer_access
from moe_heads.callbacks._shared.custom_scalars import Charts
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.options import Weights
from moe_heads.callbacks._shared.reporting import Report, log_charts, log_figures, log_report
from moe_heads.callbacks._shared.trainer_access import (
    Split,
    analyzing,
    best_weights,
    collective_timeout,
    datamodule_of,
    forward_context,
    num_overfit_batches,
    process_group_of,
    to_analysis_device,
)
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TrainerContext"]

_DRY_RUN_SAMPLES = 16


class TrainerContext(ExecutionContext):
    """Context of a run of a Trainer, of ``lightning.pytorch`` or of ``pytorch_lightning``.

    Args:
        trainer: The trainer.
        owner: Name of the callback in messages.
    """

    trainer: Trainer
    announces_validation = True

    def __init__(self, trainer: Trainer, owner: str) -> None:
        self.trainer, self.owner = trainer, owner

    @property
    @override
    def step(self) -> int:
        return self.trainer.global_step

    @property
    @override
    def epoch(self) -> int:
        return self.trainer.current_epoch

    @property
    @override
    def analyses(self) -> Sequence[TrainingAnalysis]:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, TrainingAnalysis)]

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return self.trainer.optimizers

    @property
    @override
    def class_names(self) -> Any:
        return getattr(datamodule_of(self.trainer), "class_names", None)

    @property
    @override
    def is_rank_zero(self) -> bool:
        return self.trainer.is_global_zero

    @override
    def ranks(self, name: str) -> Ranks:
        return Ranks(process_group_of(self.trainer), name)

    @contextmanager
    @override
    def prepared(self, model: nn.Module, weights: Weights) -> Iterator[None]:
        module = cast(LightningModule, model)
        with torch.inference_mode(False), torch.enable_grad(), analyzing(self.trainer, module), preserved(model):
            # a dry run writes no checkpoint
            if weights == "best" and not self._is_dry:
                best_weights(self.trainer, module)
            model.eval()
            yield

    @property
    @override
    def batch_index(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_idx

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        return forward_context(self.trainer)

    @override
    def loader_of(self, split: Split) -> Any | None:
        return trainer_access.loader_of(self.trainer, split)

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
        num_batches = num_overfit_batches(self.trainer) if split == "train" else None
        return min(num_samples, _DRY_RUN_SAMPLES) if self._is_dry else num_samples, num_batches

    @override
    def time_limit(self) -> float | None:
        return collective_timeout(self.trainer) / 2 if self.trainer.world_size > 1 else None

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool = False) -> None:
        # the trainer clears its metrics between calls
        self.trainer.callback_metrics.update({key: torch.tensor(v) for key, v in report.keyed(prefix).items()})
        if self.is_rank_zero and not is_known:
            log_report(self.trainer.loggers, prefix, report, self.step)

    @override
    def log_epoch(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        # already equal on every rank, but Lightning warns without sync_dist
        cast(LightningModule, model).log_dict(dict(numbers), sync_dist=True)

    @override
    def log_figures(self, prefix: str, draw: "Callable[[], Mapping[str, Figure]]") -> None:
        if self.is_rank_zero:
            log_figures(self.trainer.loggers, prefix, draw, self.step)

    @override
    def log_charts(self, title: str, charts: Charts) -> None:
        if self.is_rank_zero:
            log_charts(self.trainer.loggers, title, charts)

    @property
    def _is_dry(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
