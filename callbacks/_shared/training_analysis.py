"""Analysis that follows a training, whichever loop runs it."""

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from moe_heads.analysis._shared.batches import Batch
from moe_heads.callbacks._shared.analysis import described
from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.options import AnalysisOptions, Weights
from moe_heads.callbacks._shared.stepped_analysis import SteppedAnalysis
from moe_heads.callbacks._shared.stream_check import check_streams
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["TrainingAnalysis"]


class TrainingAnalysis(SteppedAnalysis):
    """An analysis with the events of a training: it runs at the end, and every n epochs or optimizer steps.

    A loop calls the events in this order: `begin_run`, `begin_fit`, `begin_training`, then for each batch
    `begin_batch`, `before_step` (for each optimizer step) and `end_batch`, then `end_epoch`, and at last `end_training`
    and `end_fit`. `close` may come at any time, also after an error of the loop.

    Attributes:
        tracked: Metrics by split and epoch, recorded with ``every_n_epochs``.
        tracked_steps: Metrics by split and number of optimizer steps, recorded with ``every_n_train_steps``.
        is_tracking: Whether an analysis of ``every_n_epochs`` or ``every_n_train_steps`` is running.
        was_interrupted: Whether Ctrl-C ended a split of the last analysis.
        is_left_out: Whether the analysis cannot run in this training, which was said before it.
        is_step_point: Whether it runs for a point of ``every_n_train_steps`` or ``max_overhead``.
    """

    analyzes_steps: ClassVar[bool] = True
    records_batches: ClassVar[bool] = False

    def __init__(self, **options: Unpack[AnalysisOptions]) -> None:
        super().__init__(**options)
        self.tracked: dict[Split, dict[int, Mapping[str, float]]] = {}
        self.tracked_steps: dict[Split, dict[int, Mapping[str, float]]] = {}
        self.is_tracking = self.is_step_point = self.was_interrupted = self.is_left_out = False
        self._model: weakref.ref[nn.Module] | None = None

    def begin_run(self, context: ExecutionContext, model: nn.Module) -> None:
        """Forget the records of an earlier training, unless this one continues it with the same model.

        It comes before `restore`, with which a checkpoint brings its own records.
        """
        continues = context.epoch > 0 and self._model is not None and self._model() is model
        if not continues:
            self.forget()
        self._model = weakref.ref(model)

    def forget(self) -> None:
        """Forget the records of a training."""
        self.tracked, self.tracked_steps = {}, {}
        self.forget_points()

    def unsupported_if_sharded(self) -> str:
        """Return the reason why the analysis cannot run if the parameters are divided among processes, or "".

        An analysis that supports them returns "". It then runs the same forward passes on all ranks, and takes no
        gradients with torch.autograd.grad.
        """
        return f"{type(self).__name__} does not define unsupported_if_sharded() to return ''"

    def check_early(self, model: nn.Module) -> None:
        """Raise an error if the analysis cannot run, by what is known before the layers of the model may exist."""

    def check_loss(self, context: ExecutionContext, model: nn.Module) -> None:
        """Raise an error if the analysis will need a loss in this training and there is none."""
        if self.needs_loss and self.runs_in_fit:
            loss_of(model, self.loss_fn or context.loss_fn)

    def check_model(self, context: ExecutionContext, model: nn.Module) -> None:
        """Raise an error if the analysis cannot run on this model, before the training begins."""

    def begin_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        """Forget the previous results, and check the model."""
        # before any analysis of this fit: another analysis may read these results
        self.results, self._known = {}, {}
        with context.full_precision(model) if self.needs_loss else nullcontext():
            self.check_model(context, model)

    def begin_training(self, context: ExecutionContext) -> None:
        """Start the interval of steps. A resumed training has restored its number of steps by now."""
        if self.has_step_points and self.analyzes_steps and "train" in self.splits:
            check_streams(context.loader_of("train"), type(self).__name__)
        self.start_points(context.step)

    def begin_batch(self, context: ExecutionContext, batch: Batch) -> None:
        """Begin a training batch."""

    def before_backward(self) -> None:
        """Check the passes of a batch before any step. Only loops that announce the backward pass call it."""

    def before_step(self, context: ExecutionContext, optimizer: Optimizer) -> None:
        """Note the gradients and the learning rate of an optimizer step."""

    def end_batch(self, context: ExecutionContext, model: nn.Module, batch: Batch) -> None:
        """End a training batch: add a point to the series of ``every_n_train_steps`` if it is due."""
        if self.is_due(context, batch):
            self.track_step(context, model)

    def finish_batch(self) -> None:
        """Finish the records of a training batch, before an analysis of any callback runs the model again."""

    def track_step(self, context: ExecutionContext, model: nn.Module) -> None:
        """Add a point to the series of ``every_n_train_steps``; by default, analyze all splits."""
        for analysis in context.analyses:
            analysis.finish_batch()
        self.is_step_point = True
        try:
            with self.timed_point(context.step):
                self._track(context, model, self.tracked_steps, context.step)
        finally:
            self.is_step_point = False

    def end_epoch(self, context: ExecutionContext, model: nn.Module) -> None:
        """End a training epoch: add a point to the series of ``every_n_epochs`` if it is due."""
        if self.every_n_epochs is not None and (context.epoch + 1) % self.every_n_epochs == 0:
            self._track(context, model, self.tracked, context.epoch)

    def end_training(self, context: ExecutionContext) -> None:
        """End the training, before the analyses of the trained model."""
        self.stop_points()

    def end_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        """Analyze the trained model."""
        self.results = {}
        self.analyze_all(context, model, self.splits, self.weights)

    def close(self) -> None:
        """Forget what is valid within one run only: between two runs, anything may change."""
        self._known = {}

    def kept_in_checkpoints(self) -> dict[str, Any]:
        """Return the state that a resumed training needs, as tensors and plain data; nothing if there is none."""
        series = {"tracked": self.tracked, "tracked_steps": self.tracked_steps}
        return self.kept_points() | {
            name: {split: {at: dict(metrics) for at, metrics in points.items()} for split, points in of_splits.items()}
            for name, of_splits in series.items()
            if of_splits
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Restore the state that `kept_in_checkpoints` returned, also that of an earlier version."""
        self.tracked, self.tracked_steps = kept.get("tracked", {}), kept.get("tracked_steps", {})
        self.restore_points(kept)

    @property
    def runs_in_training(self) -> bool:
        """True if the analysis runs during the training, every n epochs or steps, or with a share of its time."""
        return any(each is not None for each in (self.every_n_epochs, self.every_n_train_steps, self.max_overhead))

    @property
    def runs_in_fit(self) -> bool:
        """True if the analysis runs at the end of the training or during it."""
        return self.runs_in_training or self.stages is None or "fit" in self.stages

    def analyze_all(
        self, context: ExecutionContext, model: nn.Module, splits: Iterable[Split], weights: Weights
    ) -> dict[Split, Mapping[str, float]]:
        """Analyze splits one by one; an error or Ctrl-C ends the analysis of a split, not the run.

        Returns:
            Metrics of the analyzed splits.
        """
        done: dict[Split, Mapping[str, float]] = {}
        self.was_interrupted = False
        if self.is_left_out:
            return done
        for split in splits:
            name = f"{self.name}/{split}"
            try:
                analyzed = self.analyze_split(context, model, split, weights)
                done.update([] if analyzed is None else [analyzed])
            except KeyboardInterrupt as error:
                self.was_interrupted = True
                rank_zero_warn(f"{name}: {described(error)}. The trained model is unchanged.")
            except Exception as error:
                if self.on_error == "raise":
                    raise
                rank_zero_warn(
                    f"{name}: {described(error)}\nThe trained model is unchanged, and the other analyses continue."
                    f" Pass {type(self).__name__}(on_error='raise') for the traceback."
                )
        return done

    def _track(
        self,
        context: ExecutionContext,
        model: nn.Module,
        tracked: dict[Split, dict[int, Mapping[str, float]]],
        at: int,
    ) -> None:
        self.results = {}  # results of earlier weights do not belong to these
        self.is_tracking = True
        try:
            done = self.analyze_all(context, model, self.splits, "last")
        finally:
            self.is_tracking = False
        for split, metrics in done.items():
            tracked.setdefault(split, {})[at] = metrics
