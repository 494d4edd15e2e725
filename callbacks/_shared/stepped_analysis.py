"""Points of a series during a training: the steps at which they begin, their cost, and their size."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import Unpack

from moe_heads.analysis._shared.batches import Batch, num_rows
from moe_heads.callbacks._shared.analysis import Analysis
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.options import AnalysisOptions
from moe_heads.callbacks._shared.point_costs import PointCosts
from moe_heads.callbacks._shared.step_interval import StepInterval
from moe_heads.callbacks._shared.time_budget import LONGEST_WAIT, Decision, TimeBudget

__all__ = ["SteppedAnalysis"]

# Fewest samples of a point that is made smaller.
_FEWEST_SAMPLES = 32


class SteppedAnalysis(Analysis):
    """An analysis with points every n optimizer steps, or at steps that a budget of time chooses.

    Attributes:
        costs: Seconds of these points.
    """

    times_points: ClassVar[bool] = True
    has_smaller_points: ClassVar[bool] = True

    def __init__(self, **options: Unpack[AnalysisOptions]) -> None:
        super().__init__(**options)
        self._interval = None if self.every_n_train_steps is None else StepInterval(self.every_n_train_steps)
        if self.max_overhead is not None and not self.times_points:
            raise ValueError(
                f"max_overhead: expected None, as a point of {type(self).__name__} runs no pass of its own, got"
                f" {self.max_overhead!r}. Pass every_n_train_steps."
            )
        self._budget = None if self.max_overhead is None else TimeBudget(self.max_overhead)
        self.costs = PointCosts()

    @property
    def num_reductions(self) -> int:
        """Number of times that the points of ``max_overhead`` were made smaller."""
        return 0 if self._budget is None else self._budget.level

    @property
    def has_step_points(self) -> bool:
        """True with ``every_n_train_steps`` or ``max_overhead``."""
        return self._interval is not None or self._budget is not None

    def start_points(self, step: int) -> None:
        """Start the series, or continue it, at a number of steps."""
        for steps in (self._interval, self._budget):
            if steps is not None:
                steps.start(step)
        self.costs.start()

    def stop_points(self) -> None:
        """End the series with the training."""
        self.costs.stop()
        if self._budget is not None and not self.costs.seconds:
            rank_zero_warn(
                f"{self.name}: the training did not pay for a point with max_overhead={self.max_overhead:g}, so there"
                " is none. Raise max_overhead, or pass every_n_train_steps."
            )

    def forget_points(self) -> None:
        """Forget the points of a training."""
        self.costs.forget()
        if self._budget is not None:
            self._budget.forget()

    def kept_points(self) -> dict[str, Any]:
        """Return the state of the budget that a resumed training needs; nothing without a budget."""
        if self._budget is None or not self.costs.seconds:
            return {}
        return {"max_overhead": {"costs": self.costs.state(), "budget": self._budget.state()}}

    def restore_points(self, kept: Mapping[str, Any]) -> None:
        """Restore the state that `kept_points` returned."""
        if self._budget is not None and "max_overhead" in kept:
            self.costs.restore(kept["max_overhead"]["costs"])
            self._budget.restore(kept["max_overhead"]["budget"])

    def comes_within(self, step: int) -> bool:
        """Return whether a point may come until a number of steps."""
        if self._budget is not None:
            return self._budget.comes_within(step)
        return self._interval is not None and self._interval.comes_within(step)

    def is_due(self, context: ExecutionContext, batch: Batch) -> bool:
        """Return whether a point of ``every_n_train_steps`` or ``max_overhead`` begins after a batch, on all ranks."""
        if self._interval is not None:
            return self._interval.is_due(context.step)
        budget = self._budget
        if budget is None or not budget.comes_within(context.step):
            return False
        # the clocks of the processes differ
        decision = context.ranks(self.name).run_on_rank_zero(partial(self._decision, budget, context, batch))
        if decision.level > budget.level:
            rank_zero_warn(
                f"{self.name}: {LONGEST_WAIT} steps do not pay for a point with max_overhead={self.max_overhead:g}. The"
                f" points are made smaller: {self.described_point(decision.level)}. Raise max_overhead, or pass fewer"
                " num_samples."
            )
        return budget.follow(decision)

    def _decision(self, budget: TimeBudget, context: ExecutionContext, batch: Batch) -> Decision:
        return budget.decide(
            context.step,
            training=self.costs.training_seconds(self.seconds_of_others(context)),
            earlier=self.costs.earlier,
            first_cost=self.steps_of_a_point(batch),
            most_levels=self.most_levels,
        )

    def overhead(self, context: ExecutionContext) -> float:
        """Return the seconds of the points over those of the training without the points of any analysis."""
        return self.costs.overhead(self.seconds_of_others(context))

    def seconds_of_others(self, context: ExecutionContext) -> float:
        """Return the seconds of the points of the other analyses in this run."""
        others: list[SteppedAnalysis] = [each for each in context.analyses if each is not self]
        return sum(each.costs.of_run for each in others)

    def steps_of_a_point(self, batch: Batch) -> float:
        """Return the expected cost of the first point of ``max_overhead``, in training steps.

        By default four passes over the samples of all splits, in units of a step with three passes over its batch.
        """
        return 4 / 3 * self.batches_of_a_point(batch)

    def batches_of_a_point(self, batch: Batch) -> float:
        """Return the number of samples of all splits, in units of the samples of a training batch."""
        return self.num_samples * len(self.splits) / max(num_rows(batch), 1)

    @property
    def most_levels(self) -> int:
        """Number of times that the samples of a point of ``max_overhead`` can be halved."""
        return int(math.log2(max(self.num_samples / _FEWEST_SAMPLES, 1))) if self.has_smaller_points else 0

    def samples_of_a_point(self, level: int) -> int:
        """Return the number of samples of a point that was made smaller."""
        return self.num_samples >> level

    def described_point(self, level: int) -> str:
        """Return the size of a point that was made smaller, as text."""
        return f"{self.samples_of_a_point(level)} samples"

    @contextmanager
    def timed_point(self, step: int) -> Iterator[None]:
        """Count the time inside the block as that of a point, with the number of samples that the budget allows."""
        before, num_samples = self.costs.of_run, self.num_samples
        if self._budget is not None:
            self.num_samples = self.samples_of_a_point(self._budget.level)
        try:
            with self.costs.point(step):
                yield
        finally:
            self.num_samples = num_samples
            if self._budget is not None:
                self._budget.pay(self.costs.of_run - before)
