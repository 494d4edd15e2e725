"""Warm-up and rounds with a fake clock: each call returns its own duration."""

import gc
import random
import time
from collections.abc import Iterable, Iterator
from functools import partial

import pytest
import torch

from moe_heads.analysis.inference_timing.clock import Reading
from moe_heads.analysis.inference_timing.measure import TimedCall, take_turns, warm_up_all
from moe_heads.analysis.inference_timing.plan import TimingPlan


class FakeClock:
    """Takes the number that a call returns for its milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.device = 0.0, torch.device("cpu")
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def time(self, call: object) -> Reading:
        ms = call()
        self.now += ms / 1e3
        return Reading(ms, float("nan"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def taking(times: Iterable[float]) -> TimedCall:
    source = iter(times)
    return TimedCall(lambda: next(source))


def forever(ms: float) -> Iterator[float]:
    while True:
        yield ms


def warmed(call: TimedCall, clock: FakeClock, num_runs: int | None = None, seconds: float = 1.0) -> TimedCall:
    plan = TimingPlan(warmup_runs=num_runs, seconds_per_size=2 * seconds)
    warm_up_all({0: call}, clock, plan, lambda: None)
    return call


def test_the_warm_up_ends_when_two_windows_agree(clock: FakeClock) -> None:
    # the median of runs 9 to 13 is the first within 5 % of that of runs 4 to 8
    call = warmed(taking([90, 80, 30, 20, 11, 10.1, 10, 10, 10, 10, 10, 10, 10]), clock, seconds=9)
    assert (call.warmup_runs, call.is_stable, call.last_ms) == (13, True, 10)


def test_a_warm_up_that_does_not_become_stable_ends_in_time_and_says_so(clock: FakeClock) -> None:
    call = warmed(taking(100 * 2.0**i for i in range(50)), clock)
    assert (call.warmup_runs, call.is_stable) == (4, False)
    assert warmed(taking(forever(5000)), clock).warmup_runs == 1


def test_the_number_of_warm_up_runs_can_be_given(clock: FakeClock) -> None:
    assert warmed(taking(forever(7)), clock, num_runs=3).warmup_runs == 3
    none = warmed(taking([]), clock, num_runs=0)
    assert (none.warmup_runs, none.is_stable) == (0, False)


def test_short_calls_run_several_times_a_turn_after_one_unrecorded(clock: FakeClock) -> None:
    short, long = warmed(taking(forever(0.5)), clock), warmed(taking(forever(50)), clock)
    calls = []
    short.function = lambda: calls.append(1) or 0.5
    shares: list[float] = []
    turns = {"short": short, "long": long}
    take_turns(turns, clock, num_runs=200, seconds=1, order=random.Random(0), on_round=shares.append)
    # 2 ms of the short one, one of the long one, until one second is over
    assert {len(found) for found in short.rounds} == {4}
    assert {len(found) for found in long.rounds} == {1}
    assert len(long.rounds) == 20
    assert len(calls) == 20 * (1 + 4)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_turn_ends_early_where_runs_take_longer_than_in_the_warm_up(clock: FakeClock) -> None:
    call = warmed(taking(forever(0.25)), clock)
    call.function = lambda: 3.0
    options = {"num_runs": 200, "seconds": 0.1, "order": random.Random(0), "on_round": lambda _: None}
    take_turns({0: call}, clock, **options)
    # eight runs of 0.25 ms were expected
    assert {len(found) for found in call.rounds} == {2}


def test_no_more_runs_than_asked_for_and_six_rounds_at_least(clock: FakeClock) -> None:
    def timed(ms: float, num_runs: int) -> TimedCall:
        call = warmed(taking(forever(ms)), clock)
        take_turns({0: call}, clock, num_runs=num_runs, seconds=1, order=random.Random(0), on_round=lambda _: None)
        return call

    assert timed(0.1, 200).num_runs == 200
    assert timed(0.1, 3).num_runs == 3
    assert timed(9000, 200).num_runs == 6
    assert timed(9000, 2).num_runs == 2


def test_the_order_of_turns_is_random_and_follows_the_seed(clock: FakeClock) -> None:
    def order(seed: int) -> list[str]:
        turns: list[str] = []

        def turn(name: str) -> float:
            turns.append(name)
            return 5.0

        calls_by_name = {name: TimedCall(partial(turn, name)) for name in "abc"}
        options = {"num_runs": 10, "seconds": 99, "on_round": lambda _: None}
        take_turns(calls_by_name, clock, order=random.Random(seed), **options)
        return turns

    first = order(1)
    assert first == order(1) != order(2)
    rounds = [tuple(first[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(rounds)) > 1


def test_garbage_is_collected_between_the_rounds_only(clock: FakeClock) -> None:
    inside, between = [], []
    call = TimedCall(lambda: inside.append(gc.isenabled()) or 1.0)
    options = {"num_runs": 2, "seconds": 9, "order": random.Random(0)}
    take_turns({0: call}, clock, on_round=lambda _: between.append(gc.isenabled()), **options)
    assert not any(inside)
    assert all(between)

    def fail() -> float:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        take_turns({0: TimedCall(fail)}, clock, on_round=lambda _: None, **options)
    assert gc.isenabled()


def test_rounds_stop_when_one_more_would_be_too_long(clock: FakeClock) -> None:
    call, rounds = TimedCall(lambda: 1.0), []
    options = {"num_runs": 9, "seconds": 9, "order": random.Random(0), "on_round": lambda _: None}
    take_turns({0: call}, clock, is_over=lambda seconds: rounds.append(seconds) or len(rounds) == 2, **options)
    assert call.num_runs == 2
    # one run unrecorded, and one timed
    assert rounds == pytest.approx([1e-3, 1e-3])
