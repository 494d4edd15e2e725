"""Progress display, time limit and partial results."""

import time
from typing import Any

import pytest

from moe_heads.analysis._shared.progress import Progress, TimeUp


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_steps_are_shown_with_their_quantities() -> None:
    seen: list[Any] = []
    progress = Progress(show=lambda *step: seen.append(step))
    progress.step(1)
    progress.step(2, 5, residual=0.25)
    assert seen == [(1, None, {}), (2, 5, {"residual": 0.25})]


def test_the_time_is_over_at_the_next_look_at_the_clock(clock: list[float]) -> None:
    progress = Progress(max_time=10)
    progress.tick()
    clock[0] = 110.5
    with pytest.raises(TimeUp, match="max_time = 10 s was over before there was a result"):
        progress.tick()
    with pytest.raises(TimeUp):
        progress.step(1, 2)
    progress.step(2, 2)  # all is done: nothing is left to be cut off


def test_without_a_limit_there_is_no_error(clock: list[float]) -> None:
    progress = Progress()
    clock[0] = 1e9
    progress.tick()


def test_the_partial_result_is_the_result_in_time(clock: list[float]) -> None:
    progress = Progress(max_time=1)
    assert progress.partial("interrupted") is None
    error = TimeUp("nothing yet")
    with pytest.raises(TimeUp, match="nothing yet"):
        progress.result_in_time(error)
    progress.keep(lambda reason: ("first", reason))
    progress.keep(lambda reason: ("second", reason))
    assert progress.partial("interrupted") == ("second", "interrupted")
    assert progress.result_in_time(error) == ("second", "max_time = 1 s was over")


def test_what_a_part_keeps_is_wrapped_for_the_whole(clock: list[float]) -> None:
    progress = Progress(max_time=5)
    part = progress.part(lambda plane: ("line", plane))
    assert part.partial("x") is None
    part.keep(lambda reason: f"plane until {reason}")
    assert part.partial("x") == "plane until x"
    assert progress.partial("x") == ("line", "plane until x")
    clock[0] = 200
    with pytest.raises(TimeUp):
        part.tick()


@pytest.mark.parametrize("max_time", [0, -1, float("inf"), float("nan"), "5", True])
def test_a_limit_other_than_a_positive_number_raises_an_error(max_time: Any) -> None:
    with pytest.raises(ValueError, match="max_time: expected a positive number of seconds or None, got"):
        Progress(max_time)
