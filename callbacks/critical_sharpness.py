"""Callback for the critical sharpness of the optimizer's own steps during training."""

import math
import weakref
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis.critical_sharpness.figures import Series, plot_steps
from moe_heads.analysis.critical_sharpness.function import check_search
from moe_heads.analysis.critical_sharpness.result import CriticalSharpnessResult
from moe_heads.callbacks._critical_step import RecordedStep, Search, chosen_optimizer
from moe_heads.callbacks._shared.analysis import described
from moe_heads.callbacks._shared.cost_report import cost_metrics
from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import OnError
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_at_least, check_positive

__all__ = ["CriticalSharpnessCallback"]

# Default number of optimizer steps between two points.
_EVERY_N_TRAIN_STEPS = 10

# Passes of a point, in units of the three passes of a training step.
_STEPS_OF_A_POINT = 7 / 3


class CriticalSharpnessCallback(FitEndAnalysis):
    r"""Critical sharpness of the steps of any torch optimizer, every n steps of the training.

    `moe_heads.analysis.critical_sharpness` documents the quantity: :math:`\lambda_c = 2 / \eta_c`, with the smallest
    learning rate :math:`\eta_c` at which the step that was made would have raised the loss. It takes 5 to 8 forward
    passes a point, and works with autocast, torch.compile, DDP and gradient accumulation. The batches of the step are
    evaluated in training mode with the random numbers of the step. With fewer than all samples of a batch
    (``fraction``), random numbers such as those of dropout are drawn for these alone.

    The update is the difference of the parameters before and after the step. So it has clipped gradients, momentum and
    weight decay as they were. The training is bit for bit that without the callback. Logged at every point, below
    ``critical_sharpness/step/``:

    ===============  ===============================================================================================
    lambda_c         critical sharpness, left out where it is unknown
    threshold        :math:`2 / \eta`. The step lowered the loss on its batch exactly if ``lambda_c`` is below
    critical_step    multiple of the step at which the loss rises, :math:`\eta_c / \eta`. Below 1, the step was too long
    relative_error   largest relative error of both, from the width of the bracket and from rounding
    loss             loss before the step, on the evaluated samples
    num_passes       number of passes over the evaluated samples
    num_unknown      number of points so far at which the value is unknown, such as those without a descent direction
    ===============  ===============================================================================================

    and at the end of fit ``overhead``, the seconds of the points over those of the training without them, and mean,
    smallest and largest number of passes and seconds of a point: ``passes_mean``, ``seconds_max`` and so on.

    If the parameter groups have several learning rates, ``lambda_c`` and ``threshold`` are left out, since they have no
    unit. A figure at the end of fit shows the values over the steps, with the largest eigenvalues of a
    `SharpnessCallback` with ``every_n_train_steps`` in the same training.

    Args:
        every_n_train_steps: Number of optimizer steps between two points; by default 10 without ``max_overhead``.
        fraction: Share of each batch that is evaluated, the first samples. The loss of a part is not that of the step,
            but its passes are cheaper.
        tolerance: Relative width of the bracket at which the search ends.
        max_passes: Maximum number of passes a point.
        smallest_step: Multiple of the step at which the search ends if the loss rises at once.
        largest_step: Multiple of the step at which the search ends if the loss does not rise.
        optimizer: Number of the optimizer in the order of ``configure_optimizers``, needed if there are several.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar``; by default the module's ``analysis_loss(batch)``, else the
            output of its ``training_step``.
        on_error: "warn", the default: a failed point is reported and the training continues; "raise": its error ends
            the run.
        name: First part of the keys; by default "critical_sharpness".
        max_overhead: Seconds of the points over those of the training without them, instead of
            ``every_n_train_steps``. The clock chooses the steps, which are not reproducible; see `AnalysisOptions`.

    Attributes:
        results: The last result, by split "train".
        tracked_steps: Metrics of each point by split "train" and number of optimizer steps.
        num_unknown: Number of points with an unknown value, by reason.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from moe_heads.callbacks import CriticalSharpnessCallback
        >>> CriticalSharpnessCallback(every_n_train_steps=10, fraction=0.25).name
        'critical_sharpness'
    """

    name = "critical_sharpness"
    default_splits = ("train",)
    analyzes_steps = False
    has_smaller_points = False
    results: dict[Any, CriticalSharpnessResult]

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        *,
        fraction: float = 1.0,
        tolerance: float = 0.05,
        max_passes: int = 12,
        smallest_step: float = 1e-3,
        largest_step: float = 1e5,
        optimizer: int | None = None,
        loss_fn: LossFn | None = None,
        on_error: OnError = "warn",
        name: str | None = None,
        max_overhead: float | None = None,
    ) -> None:
        check_search(tolerance, max_passes, smallest_step, largest_step)
        check_positive(fraction=fraction)
        if fraction > 1:
            raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction!r}.")
        if every_n_train_steps is None and max_overhead is None:
            every_n_train_steps = _EVERY_N_TRAIN_STEPS
        check_at_least(0, or_none=True, optimizer=optimizer)
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            max_overhead=max_overhead,
            stages=("fit",),
            loss_fn=loss_fn,
            on_error=on_error,
            name=name,
        )
        self.search = Search(fraction, tolerance, max_passes, smallest_step, largest_step)
        self.optimizer = optimizer
        self.num_unknown: dict[str, int] = {}
        self._step: RecordedStep | None = None
        self._start = 1.0
        self._overhead: float | None = None
        self._trained: weakref.ref[nn.Module] | None = None

    @override
    def unsupported_if_sharded(self) -> str:
        return ""

    @override
    def check_model(self, context: ExecutionContext, model: nn.Module) -> None:
        chosen_optimizer(type(self).__name__, context.optimizers, self.optimizer)

    @override
    def begin_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        super().begin_fit(context, model)
        self._trained, self._step = weakref.ref(model), None

    @override
    def forget(self) -> None:
        super().forget()
        self.num_unknown, self._start = {}, 1.0

    @property
    def seconds(self) -> float:
        """Seconds of the points of this run."""
        return self.costs.of_run

    @override
    def begin_batch(self, context: ExecutionContext, batch: Batch) -> None:
        # a batch takes at most one step of each optimizer; with accumulation, all batches before a step are needed
        if self._step is None and self.comes_within(context.step + max(len(context.optimizers), 1)):
            self._step = RecordedStep()
        if self._step is not None:
            self._step.begin_batch()

    @override
    def before_step(self, context: ExecutionContext, optimizer: Optimizer) -> None:
        model = None if self._trained is None else self._trained()
        if self._step is None or model is None:
            return
        chosen = chosen_optimizer(type(self).__name__, context.optimizers, self.optimizer)
        if optimizer.param_groups is chosen.param_groups:  # also inside a wrapper of the loop
            self._step.before_step(chosen, model)

    @override
    def end_batch(self, context: ExecutionContext, model: nn.Module, batch: Batch) -> None:
        step = self._step
        if step is None or self.is_left_out:
            return
        try:
            step.end_batch(batch, context.batch_index)
            if step.before is None:
                return
            self._step = None
            if not self.is_due(context, batch):
                return
            for analysis in context.analyses:
                analysis.finish_batch()
            with self.timed_point(context.step):
                self._measure(context, model, step)
        except Exception as error:
            self._step = None
            if self.on_error == "raise":
                raise
            rank_zero_warn(f"{self.name}: {described(error)}\nThe training is not affected, and continues.")

    @override
    def end_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        points = self.tracked_steps.get("train", {})
        if not points:
            return
        self._overhead = self.overhead(context)
        metrics = cost_metrics(self._costs(), self._overhead)
        report = Report(metrics, {"summary": self.summary()}, {"tracking": self._figure(context)})
        context.log(f"{self.name}/step", report)

    @override
    def close(self) -> None:
        self._step = None
        super().close()

    @override
    def kept_in_checkpoints(self) -> dict[str, Any]:
        own: dict[str, Any] = {"num_unknown": dict(self.num_unknown), "start": self._start}
        return super().kept_in_checkpoints() | (own if self.tracked_steps else {})

    @override
    def restore(self, kept: dict[str, Any]) -> None:
        super().restore(kept)
        self.num_unknown, self._start = dict(kept.get("num_unknown", {})), kept.get("start", 1.0)

    @override
    def compute(self, inputs: AnalysisInputs) -> CriticalSharpnessResult:
        raise MisconfigurationException(
            f"{type(self).__name__}: expected the steps of a training, got a call of analyze(). Call"
            " moe_heads.analysis.critical_sharpness(model, loss_fn, batches, update_of(optimizer, model))."
        )

    @override
    def report(self, result: CriticalSharpnessResult) -> Report:
        return Report(result.metrics(), {"summary": result.summary()}, {"step": result.plot()[0]})

    def summary(self) -> str:
        """Return the number of points, the unknown ones by reason, and their cost, in Markdown."""
        points = self.tracked_steps.get("train", {})
        passes = sum(point["num_passes"] for point in points.values()) / max(len(points), 1)
        more = "" if self._overhead is None else f", {100 * self._overhead:.3g} % of the training without the points"
        lines = [
            f"- {len(points)} points, {self._interval_as_text()},"
            f" {passes:.1f} passes a point over {100 * self.search.fraction:g} % of the batch",
            f"- {self.seconds:.3g} s{more}",
            *(f"- unknown at {number} points: {reason}" for reason, number in self.num_unknown.items()),
        ]
        return "\n".join(lines)

    def _measure(self, context: ExecutionContext, model: nn.Module, step: RecordedStep) -> None:
        ranks = context.ranks(f"{self.name}/step")
        loss_fn = loss_of(model, self.loss_fn or context.loss_fn)
        with ranks.working():
            result = step.measure(context, model, loss_fn, self.search, self._start, ranks)
        self.results["train"] = result
        if result.reason:
            kind = result.reason.split(":")[0]
            self.num_unknown[kind] = self.num_unknown.get(kind, 0) + 1
        elif math.isfinite(result.critical_step):
            self._start = result.critical_step
        metrics = result.metrics() | {"num_unknown": float(sum(self.num_unknown.values()))}
        if step.learning_rate is None:  # in units of no learning rate
            metrics = {key: value for key, value in metrics.items() if key not in {"lambda_c", "threshold"}}
        self.tracked_steps.setdefault("train", {})[context.step] = metrics
        context.log(f"{self.name}/step", Report(metrics))

    def _interval_as_text(self) -> str:
        if self.max_overhead is not None:
            return f"at steps chosen by the clock for at most {100 * self.max_overhead:g} % more time"
        return f"one every {self.every_n_train_steps} steps"

    def _costs(self) -> dict[str, list[float]]:
        points = self.tracked_steps.get("train", {}).values()
        return {"passes": [point["num_passes"] for point in points], "seconds": list(self.costs.seconds.values())}

    @override
    def steps_of_a_point(self, batch: Batch) -> float:
        return _STEPS_OF_A_POINT * self.search.fraction

    def _figure(self, context: ExecutionContext) -> Any:
        """Return the figure over the steps, with the eigenvalues of the first `SharpnessCallback` of the training."""
        tracked: list[Series] = [each.tracked_steps.get("train", {}) for each in context.analyses if each is not self]
        with_eigenvalues = (points for points in tracked if any("lambda_max" in each for each in points.values()))
        return plot_steps(next(with_eigenvalues, {}), self.tracked_steps.get("train", {}))
