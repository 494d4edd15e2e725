"""Search for the smallest step along a line at which a loss rises above its value at the start."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Rise", "first_rise"]

# Largest factor between two steps before a rise is found, as the secant may be far off.
_MOST_GROWTH = 8.0


@dataclass
class Rise:
    """Losses along a line, and the steps between which the loss rises above that of the start.

    Attributes:
        base: Loss at the start.
        losses: Loss by step.
        low: Largest step without a rise below ``high``; 0.0 if every step has one.
        high: Smallest step with a rise; infinity if there is none.
    """

    base: float
    losses: dict[float, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = math.inf

    @property
    def is_bracketed(self) -> bool:
        """True if the step lies between two steps that were evaluated."""
        return self.low > 0 and math.isfinite(self.high)

    @property
    def width(self) -> float:
        """Ratio of the two steps minus 1."""
        return self.high / self.low - 1 if self.low > 0 else math.inf

    def add(self, step: float, loss: float) -> None:
        """Record a loss. A loss that is not finite is a rise."""
        self.losses[step] = loss
        if not loss <= self.base:
            self.high = min(self.high, step)
        self.low = max((t for t, value in self.losses.items() if t < self.high and value <= self.base), default=0.0)

    def slope(self, step: float) -> float:
        """Return the mean slope between the start and a step. On a quadratic, it is linear in the step."""
        return (self.losses[step] - self.base) / step

    def secant(self, one: float, other: float) -> float:
        """Return the step at which the mean slope is zero, by linear extrapolation from two steps; else NaN."""
        first, second = self.slope(one), self.slope(other)
        if not (math.isfinite(first) and math.isfinite(second)) or first == second:
            return math.nan
        return one - first * (other - one) / (second - first)


def first_rise(
    loss_at: Callable[[float], float],
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    smallest: float = 1e-3,
    largest: float = 1e5,
    max_losses: int = 12,
) -> Rise:
    """Bracket the smallest step at which a loss rises above its value at 0.

    Steps grow or shrink from ``start`` until a rise is bracketed. Then the bracket shrinks by secants of the mean slope
    between 0 and a step, which are exact on a quadratic, and by bisection of the logarithm where they fail. A loss that
    rises and falls again between two evaluated steps is not noticed.

    Args:
        loss_at: Returns the loss at a step.
        start: First step, such as the result for an earlier update.
        tolerance: Ratio of the two ends of the bracket minus 1 at which the search ends.
        smallest: Step at which the search ends if all larger steps have a rise.
        largest: Step at which the search ends if there is no rise.
        max_losses: Maximum number of evaluations.

    Returns:
        The losses and the bracket.

    Example:
        >>> from moe_heads.analysis.critical_sharpness.search import first_rise
        >>> rise = first_rise(lambda step: 0.5 * step**2 - 3.0 * step)
        >>> rise.low < 6.0 < rise.high, rise.width < 0.05, len(rise.losses)
        (True, True, 4)
    """
    rise = Rise(loss_at(0.0))
    step = min(max(start, smallest), largest)
    halves = False
    while True:
        before = rise.width
        rise.add(step, loss_at(step))
        is_over = rise.high <= smallest or (rise.low >= largest) or rise.width <= tolerance
        if is_over or len(rise.losses) + 1 >= max_losses:
            return rise
        # bisect after a secant that shrank the bracket too little
        halves = rise.is_bracketed and math.isfinite(before) and rise.width > before / 2 and not halves
        step = _inside(rise, tolerance / 3, halves) if rise.is_bracketed else _outside(rise, tolerance / 3)
        step = min(max(step, smallest), largest)


def _outside(rise: Rise, margin: float) -> float:
    """Return the next step before a rise is bracketed."""
    if len(rise.losses) == 1:
        return 2 * rise.low if rise.low else rise.high / 2
    nearest = sorted(rise.losses, reverse=rise.low > 0)[:2]
    guess = rise.secant(*nearest)
    if rise.low:
        farthest = _MOST_GROWTH * rise.low
        return min(guess * (1 + margin), farthest) if guess > rise.low else farthest
    farthest = rise.high / _MOST_GROWTH
    return max(guess * (1 - margin), farthest) if 0 < guess < rise.high else farthest


def _inside(rise: Rise, margin: float, halves: bool) -> float:
    """Return the next step inside the bracket: a bit beyond the secant, so that the other end follows."""
    low, high = rise.low, rise.high
    middle = math.sqrt(low * high)
    guess = rise.secant(low, high)
    if halves or not low <= guess <= high:
        return middle
    before, after = guess / (1 + margin), guess * (1 + margin)
    if before <= low:
        return after if after < high else middle
    if after >= high:
        return before
    return after if high / guess > guess / low else before
