"""Interval of optimizer steps between two points of a series."""

__all__ = ["StepInterval"]


class StepInterval:
    """Interval of n optimizer steps.

    It is due when the number of steps reaches or passes a multiple of n. So a batch of gradient accumulation, which
    takes no step, is never due, and a batch of several optimizers, which takes several steps, passes no multiple
    unnoticed.

    Args:
        n: Number of steps between two points.

    Attributes:
        last: Number of steps at the last point, or at the start.

    Example:
        >>> from moe_heads.callbacks._shared.step_interval import StepInterval
        >>> interval = StepInterval(3)
        >>> [step for step in (2, 4, 4, 6, 8) if interval.is_due(step)]
        [4, 6]
    """

    def __init__(self, n: int) -> None:
        self._n, self.last = n, 0

    def start(self, step: int) -> None:
        """Start, or continue, at a number of steps: the next multiple after it is due."""
        self.last = step

    def comes_within(self, step: int) -> bool:
        """Return whether a point comes until a number of steps, without a change of the interval."""
        return step // self._n != self.last // self._n

    def is_due(self, step: int) -> bool:
        """Return whether the number of steps reached or passed a multiple of n since the last point."""
        if not self.comes_within(step):
            return False
        self.last = step
        return True
