"""Expert utilization during one training: collection of the routing, and its points by epoch and by window of steps."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.names import are_names
from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.label_check import LabelCheck
from moe_heads.analysis.expert_utilization.label_entry import labels_of
from moe_heads.analysis.expert_utilization.labels import LabelFn
from moe_heads.analysis.expert_utilization.token_masks import MaskFn
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._utilization_log import UtilizationLog
from moe_heads.callbacks._utilization_points import History, add_window
from moe_heads.callbacks._utilization_warnings import UtilizationWarnings
from moe_heads.routing import Adapters, collect_routing

__all__ = ["TrainingUtilization", "UtilizationOptions", "class_names_of"]


class UtilizationOptions(Protocol):
    """Options of `ExpertUtilizationCallback` that the training uses."""

    name: str
    detail: Detail
    class_names: tuple[str, ...] | None
    label_fn: LabelFn | None
    ignore_index: frozenset[int]
    adapters: Adapters | None
    mask_fn: MaskFn | None
    dead_below: float
    starved_below: float
    inert_below: float
    warn: bool


class TrainingUtilization:
    """Utilization of the experts in one training.

    Args:
        context: Context of the training.
        model: The model. Hooks on its routers stay until `close`, since a change would make torch.compile recompile.
        options: Options of the callback.
        history: Receives the statistics of each epoch.
        history_steps: Receives those of each window.
        warnings: Warnings of the training.
        checks_labels: Whether the analysis of the training data will need labels.
    """

    def __init__(
        self,
        context: ExecutionContext,
        model: nn.Module,
        options: UtilizationOptions,
        history: History,
        history_steps: History,
        warnings: UtilizationWarnings,
        *,
        checks_labels: bool,
    ) -> None:
        self._options, self._model = options, model
        self._history, self._history_steps, self._warnings = history, history_steps, warnings
        bounds = options.dead_below, options.starved_below
        self._log = UtilizationLog(options.name, options.detail, *bounds)
        self._listening = ExitStack()
        collection = self._listening.enter_context(collect_routing(model, options.adapters))
        # a validation of a loop that announces none must not count as training
        collection.skips_evaluation = not context.announces_validation
        self._routers = TrainingRouters(
            model, collection, options.adapters, *bounds, options.inert_below, options.mask_fn
        )
        self._label_check: LabelCheck | None = None
        if checks_labels and collection.routings:
            names = options.class_names or class_names_of(context)
            self._label_check = LabelCheck(options.label_fn or labels_of, names, options.ignore_index)

    def begin_batch(self, batch: Batch) -> None:
        """Start to collect the passes of a training batch, None if it is not known yet."""
        self._routers.begin_batch(batch)
        if self._label_check is not None and batch is not None:
            self._warnings.no_classes(self._label_check.before(batch))

    def check_masks(self) -> None:
        """Raise an error for a wrong mask, so that it ends the training in its first batch, before any step."""
        if self._options.mask_fn is not None:
            self._routers.check_masks()

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Record the gradients before a step of an optimizer."""
        self._routers.note_gradients(optimizer)

    def finish_batch(self, batch: Batch = None) -> None:
        """Record the passes of the training batch, which is given if it was not known when it began."""
        if self._label_check is not None:
            reason = None if batch is None else self._label_check.before(batch)
            self._warnings.no_classes(reason or self._routers.check_labels(self._label_check))
            self._label_check = None
        self._routers.end_training_batch(batch)
        self._warnings.notes(self._routers.new_notes())

    def begin_validation_batch(self, batch: Batch) -> None:
        """Start to collect the passes of a validation batch."""
        self._routers.begin_batch(batch)

    def end_validation_batch(self, batch: Batch) -> None:
        """Record the passes of a validation batch."""
        self._routers.end_validation_batch(batch)
        self._warnings.notes(self._routers.new_notes())

    def end_validation(self) -> None:
        """Compare the choices with those of the previous validation."""
        self._routers.end_validation()

    def end_window(self, context: ExecutionContext, *, is_logged: bool = True) -> None:
        """Report the window that ends at this step. Every rank must call it.

        Args:
            context: Context of the training.
            is_logged: False if a window that ended at the same step is already logged. The loggers have one point a
                step.
        """
        prefix = f"{self._options.name}/step"
        reports = self._routers.end_window(context.ranks(prefix))
        for head, report in reports.items():
            add_window(self._history_steps.setdefault(head, {}), context.step, report.stats)
        if reports and is_logged:
            context.log(prefix, Report(self._log.window_numbers(reports, self._history_steps)))

    def end_epoch(self, context: ExecutionContext) -> None:
        """Report the epoch. Every rank must call it."""
        name = self._options.name
        reports = self._routers.end_epoch(context.ranks(f"{name}/epoch"))
        self._warnings.notes(self._routers.new_notes())
        if self._routers.validation_data_changed:
            self._warnings.validation_data_changed()
        if self._routers.none_ran:
            self._warnings.none_ran(context.epoch)
        for head, report in reports.items():
            if int(report.stats.num_rows):
                self._history.setdefault(head, {})[context.epoch] = report.stats
            self._warnings.notes(report.notes)
        numbers = self._log.numbers(reports, self._history)
        context.log_epoch(self._model, {f"{name}/epoch/{key}": value for key, value in numbers.items()})
        self._log.draw_epoch(context)
        for warning in self._log.warnings(reports) if self._options.warn else ():
            rank_zero_warn(f"{name}: epoch {context.epoch}, {warning}")

    def draw_history(self, context: ExecutionContext) -> None:
        """Draw the load over the epochs."""
        self._log.draw_history(context, self._history)

    def close(self) -> None:
        """Remove the hooks."""
        self._label_check = None
        self._listening.close()
        self._routers.close()


def class_names_of(context: ExecutionContext) -> Sequence[str] | None:
    """Return the class names that the data of a run know if they are a list of names, else None."""
    names = context.class_names
    return names if are_names(names) else None
