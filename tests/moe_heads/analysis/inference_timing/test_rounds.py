"""Warm-up and rounds by a clock of our own: each call says how long it takes."""

import gc
import random
import time
from collections.abc import Iterable, Iterator

import pytest

from moe_heads.analysis.inference_timing.clock import Sample
from moe_heads.analysis.inference_timing.rounds import Contender, take_turns, warm_up


class FakeClock:
    """Takes the number that a call returns for its milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cooled = 0.0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def time(self, call: object) -> Sample:
        ms = call()  # type: ignore[operator]
        self.now += ms / 1e3
        return Sample(ms, float("nan"))

    def cool(self) -> None:
        self.cooled += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def taking(times: Iterable[float]) -> Contender:
    source = iter(times)
    return Contender(lambda: next(source))


def forever(ms: float) -> Iterator[float]:
    while True:
        yield ms


def warmed(contender: Contender, clock: FakeClock, num_runs: int | None = None, seconds: float = 1.0) -> Contender:
    warm_up(contender, clock, num_runs=num_runs, tolerance=0.05, seconds=seconds)
    return contender


def test_the_warm_up_ends_when_two_windows_agree(clock: FakeClock) -> None:
    # the median of runs 9 to 13 is the first within 5 % of that of runs 4 to 8
    contender = warmed(taking([90, 80, 30, 20, 11, 10.1, 10, 10, 10, 10, 10, 10, 10]), clock, seconds=9)
    assert (contender.warmup_runs, contender.is_stable, contender.last_ms) == (13, True, 10)


def test_a_warm_up_that_does_not_become_stable_ends_in_time_and_says_so(clock: FakeClock) -> None:
    contender = warmed(taking(100 * 2.0**i for i in range(50)), clock)
    assert (contender.warmup_runs, contender.is_stable) == (4, False)
    assert warmed(taking(forever(5000)), clock).warmup_runs == 1


def test_the_number_of_warm_up_runs_can_be_given(clock: FakeClock) -> None:
    assert warmed(taking(forever(7)), clock, num_runs=3).warmup_runs == 3
    none = warmed(taking([]), clock, num_runs=0)
    assert (none.warmup_runs, none.is_stable) == (0, False)


def test_short_calls_run_several_times_a_turn_after_one_unrecorded(clock: FakeClock) -> None:
    short, long = warmed(taking(forever(0.5)), clock), warmed(taking(forever(50)), clock)
    calls = []
    short.call = lambda: calls.append(1) or 0.5  # type: ignore[func-returns-value]
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
    contender = warmed(taking(forever(0.25)), clock)
    contender.call = lambda: 3.0
    options = {"num_runs": 200, "seconds": 0.1, "order": random.Random(0), "on_round": lambda _: None}
    take_turns({0: contender}, clock, **options)
    # eight runs of 0.25 ms were foreseen
    assert {len(found) for found in contender.rounds} == {2}


def test_no_more_runs_than_asked_for_and_six_rounds_at_least(clock: FakeClock) -> None:
    def timed(ms: float, num_runs: int) -> Contender:
        contender = warmed(taking(forever(ms)), clock)
        take_turns({0: contender}, clock, num_runs=num_runs, seconds=1, order=random.Random(0), on_round=lambda _: None)
        return contender

    assert timed(0.1, 200).num_runs == 200
    assert timed(0.1, 3).num_runs == 3
    assert timed(9000, 200).num_runs == 6
    assert timed(9000, 2).num_runs == 2


def test_a_cold_run_is_preceded_by_something_else(clock: FakeClock) -> None:
    contender = warmed(taking(forever(0.1)), clock)
    contender.cache = "cold"
    take_turns({0: contender}, clock, num_runs=9, seconds=1, order=random.Random(0), on_round=lambda _: None)
    assert clock.cooled == contender.num_runs == 9


def test_the_order_of_turns_is_random_and_follows_the_seed(clock: FakeClock) -> None:
    def order(seed: int) -> list[str]:
        turns: list[str] = []
        contenders = {name: Contender(lambda name=name: turns.append(name) or 5.0) for name in "abc"}
        options = {"num_runs": 10, "seconds": 99, "on_round": lambda _: None}
        take_turns(contenders, clock, order=random.Random(seed), **options)
        return turns

    first = order(1)
    assert first == order(1) != order(2)
    rounds = [tuple(first[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(rounds)) > 1


def test_garbage_is_collected_between_the_rounds_only(clock: FakeClock) -> None:
    inside, between = [], []
    contender = Contender(lambda: inside.append(gc.isenabled()) or 1.0)
    options = {"num_runs": 2, "seconds": 9, "order": random.Random(0)}
    take_turns({0: contender}, clock, on_round=lambda _: between.append(gc.isenabled()), **options)
    assert not any(inside)
    assert all(between)

    def fail() -> float:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        take_turns({0: Contender(fail)}, clock, on_round=lambda _: None, **options)
    assert gc.isenabled()


def test_rounds_stop_when_one_more_would_be_too_long(clock: FakeClock) -> None:
    contender, asked = Contender(lambda: 1.0), []
    options = {"num_runs": 9, "seconds": 9, "order": random.Random(0), "on_round": lambda _: None}
    take_turns({0: contender}, clock, is_over=lambda seconds: asked.append(seconds) or len(asked) == 2, **options)
    assert contender.num_runs == 2
    # one run unrecorded, and one timed
    assert asked == pytest.approx([1e-3, 1e-3])
