"""Interval of optimizer steps, against a search for a multiple between two points."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_heads.callbacks._shared.step_interval import StepInterval


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 20), st.lists(st.integers(0, 5), max_size=40))
def test_due_where_a_multiple_was_reached_or_passed(n: int, start: int, advances: list[int]) -> None:
    interval, last, step = StepInterval(n), start, start
    interval.start(start)
    for advance in advances:
        step += advance
        expected = any(number % n == 0 for number in range(last + 1, step + 1))
        assert interval.is_due(step) == expected
        assert not interval.is_due(step)  # one point for one step
        last = step if expected else last
        assert interval.last == last
