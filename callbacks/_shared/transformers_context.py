"""Execution context of a Trainer of transformers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import integration_utils
from typing_extensions import override

from moe_heads.analysis._shared.float32_weights import Float32Copy, float32_weights
from moe_heads.analysis._shared.progress import Show
from moe_heads.analysis._shared.state import preserved
from moe_heads.callbacks._shared.custom_scalars import Charts
from moe_heads.callbacks._shared.loggers import loggers_of
from moe_heads.callbacks._shared.loop_context import LoopContext
from moe_heads.callbacks._shared.options import Weights
from moe_heads.callbacks._shared.reporting import Report, log_charts, log_figures, log_report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis
from moe_heads.callbacks._shared.transformers_access import model_of, muted_trainer, without_autocast, writers_of
from moe_heads.callbacks._shared.transformers_data import TransformersData
from moe_heads.callbacks._shared.transformers_loss import TransformersLoss
from moe_heads.callbacks._shared.wrapped_models import unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TransformersContext"]

_TERMINAL = (PrinterCallback, ProgressCallback)


class TransformersContext(LoopContext):
    """Context of a training by a Trainer of transformers: its data, loss, processes and loggers.

    Args:
        owner: Name of the callback in messages.
        analyses: The analyses.
        trainer: The Trainer, after it has prepared the model.

    Attributes:
        data: The data of the Trainer.
        transformers_trainer: The Trainer.
    """

    def __init__(self, owner: str, analyses: Sequence[TrainingAnalysis], trainer: Trainer) -> None:
        loss = TransformersLoss(trainer)
        super().__init__(owner, analyses, (), loss)
        self.batch_weight_fn = loss.weight
        # the Trainer takes the labels from the batch for a loss that is not the model's own
        self.shows_labels = trainer.compute_loss_func is None and trainer.label_smoother is None
        self.data = TransformersData(trainer)
        self.group = unwrapped(trainer.model_wrapped)[1]
        optimizer: Any = trainer.optimizer
        self.optimizers = (getattr(optimizer, "optimizer", optimizer),)  # that of torch, inside of accelerate's
        self.transformers_trainer: Any = trainer
        self._copy = Float32Copy(model_of(trainer))
        # all processes evaluate the same function, whatever their free memory
        self._uses_copy = all(self.ranks(owner).gather(self._copy.is_used))

    def say_precision(self) -> None:
        """Warn if the weights of an analysis with a loss are in half precision."""
        names = [each.name for each in self.analyses if each.needs_loss and each.runs_in_fit]
        if names and (message := self._copy.message()):
            rank_zero_warn(f"{', '.join(names)}: {message}.")

    @contextmanager
    @override
    def prepared(self, model: nn.Module, weights: Weights) -> Iterator[None]:
        self._model = model
        # the model stays where it is: quantized models cannot be moved
        self._device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            preserved(model),
            muted_trainer(self.transformers_trainer),
            self.data.generators_fixed(),
            without_autocast(model),
        ):
            model.eval()
            yield

    @override
    def full_precision(self, model: nn.Module) -> AbstractContextManager[None]:
        return float32_weights(model) if self._uses_copy else nullcontext()

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.transformers_trainer.accelerator.autocast()
        return context

    @override
    def loader_of(self, split: Split) -> Any | None:
        return self.data.loader_of(split)

    @override
    def progress(self, description: str) -> AbstractContextManager[Show]:
        is_shown = self.is_rank_zero and not self.transformers_trainer.args.disable_tqdm
        return super().progress(description) if is_shown else nullcontext(_show_nothing)

    @override
    def log(self, prefix: str, report: Report, *, is_known: bool = False) -> None:
        numbers = report.keyed(prefix)
        self.metrics.update(numbers)
        if is_known:
            return
        self._log(numbers)
        if self.is_rank_zero:
            log_report(self._media_loggers(), _tag(prefix), replace(report, metrics={}), self.step)

    @override
    def log_epoch(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        self.metrics.update(numbers)
        self._log(numbers)

    @override
    def log_figures(self, prefix: str, draw: "Callable[[], Mapping[str, Figure]]") -> None:
        if self.is_rank_zero:
            log_figures(self._media_loggers(), _tag(prefix), draw, self.step)

    @override
    def log_charts(self, title: str, charts: Charts) -> None:
        if self.is_rank_zero:
            tagged = {name: (kind, [_tag(tag) for tag in tags]) for name, (kind, tags) in charts.items()}
            log_charts(self._media_loggers(), title, tagged)

    def _log(self, numbers: Mapping[str, float]) -> None:
        """Send numbers to all integrations of ``report_to``, and to ``trainer.state.log_history``."""
        handler, control = self.transformers_trainer.callback_handler, self.transformers_trainer.control
        callbacks, should_log = handler.callbacks, control.should_log
        try:
            # dozens of numbers between the lines of the training would hide them in the terminal
            handler.callbacks = [each for each in callbacks if not isinstance(each, _TERMINAL)]
            # not the log of a subclass, which may add the numbers of the training since its last call
            Trainer.log(self.transformers_trainer, dict(numbers))
        finally:
            handler.callbacks = callbacks
            # the Trainer takes a log for that of the training loss, which it would now skip
            control.should_log = should_log

    def _media_loggers(self) -> list[Any]:
        return loggers_of(writers_of(self.transformers_trainer))


def _tag(key: str) -> str:
    """Return the tag under which the integrations of transformers write a number."""
    integration: Any = integration_utils
    tag: str = next(iter(integration.rewrite_logs({key: 0.0})))
    return tag


def _show_nothing(done: int, total: int | None, quantities: Mapping[str, float]) -> None:
    """Show no progress."""
