"""Budget of time for the points of a series: the steps at which they begin."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Decision", "TimeBudget"]

# Steps before the first look at the clock. The first steps of a training are often slower than the others.
_FIRST_LOOK = 5

# Number of previous points whose cost the next one may have.
_RECENT = 3

LONGEST_WAIT = 1000
"""Number of steps that may pay for one point. A more expensive point is made smaller."""


@dataclass(frozen=True)
class Decision:
    """A decision about the next point, equal in all processes.

    Attributes:
        is_due: Whether a point begins now.
        next_step: Number of steps at the next decision, if no point begins.
        level: How often the points were made smaller.
    """

    is_due: bool
    next_step: int
    level: int


class TimeBudget:
    """Share of the training time that the points of a series may take.

    A point begins when the share of the training time so far covers all points so far and the expected cost of this
    one. So the share holds at every point whose cost was not above the expected one, and an excess is earned before
    the next point. The expected cost is the largest of the last three points. For the first one it is a number of
    training steps that the analysis states.

    The clock is read at few steps: at the fifth, and then when the missing time has been earned at the speed so far.

    Args:
        max_overhead: Seconds of the points over those of the training without them.

    Attributes:
        level: How often the points were made smaller, because 1000 steps did not pay for one.
        spent: Seconds of all points.

    Example:
        >>> from moe_heads.callbacks._shared.time_budget import TimeBudget
        >>> budget = TimeBudget(0.1)
        >>> budget.start(0)
        >>> budget.decide(5, training=5.0, first_cost=3.0)
        Decision(is_due=False, next_step=30, level=0)
        >>> budget.follow(budget.decide(30, training=30.0, first_cost=3.0))
        True
    """

    def __init__(self, max_overhead: float) -> None:
        self.max_overhead = max_overhead
        self.forget()

    def forget(self) -> None:
        """Forget the points of a training."""
        self.level, self.spent = 0, 0.0
        # seconds and level of the last points
        self._recent: list[tuple[float, int]] = []
        self._first = self._next = 0

    def start(self, step: int) -> None:
        """Start, or continue, at a number of steps."""
        self._first, self._next = step, step + _FIRST_LOOK

    def comes_within(self, step: int) -> bool:
        """Return whether a decision comes until a number of steps."""
        return step >= self._next

    def decide(
        self,
        step: int,
        *,
        training: float,
        first_cost: float,
        earlier: float = 0.0,
        most_levels: int = 0,
    ) -> Decision:
        """Return the decision at a number of steps, for `follow`.

        Args:
            step: Number of steps.
            training: Seconds of the training so far, without points.
            first_cost: Expected cost of the first point, in training steps.
            earlier: Seconds of the training before the last `start`, a part of ``training``.
            most_levels: How often a point can be made half as expensive.
        """
        per_step = max((training - earlier) / max(step - self._first, 1), 1e-9)
        level = self.level
        recent = [seconds * 2.0 ** (at - level) for seconds, at in self._recent]
        expected = max(recent, default=first_cost * per_step / 2**level)
        while level < most_levels and expected > self.max_overhead * LONGEST_WAIT * per_step:
            expected, level = expected / 2, level + 1
        missing = self.spent + expected - self.max_overhead * training
        if missing <= 0:
            return Decision(is_due=True, next_step=step + 1, level=level)
        steps = math.ceil(missing / (self.max_overhead * per_step) - 1e-9)
        return Decision(is_due=False, next_step=step + min(max(steps, 1), LONGEST_WAIT), level=level)

    def follow(self, decision: Decision) -> bool:
        """Apply a decision, and return whether a point begins."""
        self._next, self.level = decision.next_step, decision.level
        return decision.is_due

    def pay(self, seconds: float) -> None:
        """Count the seconds of a point."""
        self.spent += seconds
        self._recent = [*self._recent, (seconds, self.level)][-_RECENT:]

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed training needs, as plain data."""
        return {"level": self.level, "spent": self.spent, "recent": [list(each) for each in self._recent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned, before `start`."""
        self.level, self.spent = state["level"], state["spent"]
        self._recent = [(seconds, level) for seconds, level in state["recent"]]
