"""Search for the first rise of a loss along a line, on functions with a known one."""

import math
from collections.abc import Callable

import pytest

from moe_heads.analysis.critical_sharpness.search import first_rise

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "quadratic": lambda t: t**2 - t,
    "quartic": lambda t: t**4 - t,
    "no slope at 0": lambda t: t**3 - t**2,
    "exponential": lambda t: math.expm1(5 * min(t, 100)) - math.expm1(5) * t,
    "infinite": lambda t: -t if t < 1 else math.inf,
    "not a number": lambda t: -t if t < 1 else math.nan,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("start", [0.01, 0.3, 0.97, 1.0, 1.6, 40.0])
def test_brackets_the_rise_at_one(name: str, start: float) -> None:
    rise = first_rise(FUNCTIONS[name], start=start, max_losses=20)
    assert rise.low <= 1 + 1e-12 and rise.high >= 1 and rise.width <= 0.05
    assert all(step > 0 for step in rise.losses)


@pytest.mark.parametrize("start", [0.02, 0.5, 0.9, 1.0, 1.1, 2.0, 50.0])
def test_five_losses_on_a_quadratic_near_the_start(start: float) -> None:
    rise = first_rise(FUNCTIONS["quadratic"], start=start)
    assert len(rise.losses) + 1 <= (5 if 0.4 < start < 2.1 else 8)


def test_ends_at_the_bounds() -> None:
    rising = first_rise(lambda t: t, smallest=1e-3)
    assert (rising.low, rising.high) == (0.0, 1e-3)
    falling = first_rise(lambda t: -t, largest=100.0)
    assert (falling.low, falling.high) == (100.0, math.inf)


def test_ends_after_the_maximum_number() -> None:
    rise = first_rise(FUNCTIONS["exponential"], start=0.01, tolerance=1e-9, max_losses=6)
    assert len(rise.losses) + 1 == 6


def test_a_decrease_above_a_rise_is_no_lower_end() -> None:
    # falls, rises and falls again: the first rise counts
    rise = first_rise(lambda t: math.sin(2 * math.pi * (t - 0.5)), start=0.9)
    assert 0.5 <= rise.high <= rise.low * 1.05 + 1
    assert rise.low < rise.high
