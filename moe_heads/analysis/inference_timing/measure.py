"""Measurement of calls: warm-up until stable, and interleaved rounds in random order."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.clock import Clock, Reading
from moe_heads.analysis.inference_timing.overhead import Overhead, overhead_of
from moe_heads.analysis.inference_timing.plan import FEWEST_ROUNDS, TimingPlan

__all__ = [
    "TimedCall",
    "first_line",
    "take_turns",
    "warm_up_all",
]

# A short call runs several times per turn, for this long or up to a share of its runs.
_TURN_MS = 2.0
_LONGEST_TURN_MS = 2 * _TURN_MS
_MOST_REPEATS = 8
_ROUNDS_AT_LEAST = 25
# runs in each of the two windows whose medians the warm-up compares
_WINDOW = 5
# a time is never zero, whatever the resolution of the clock
_LEAST_MS = 1e-6
_MOST_LETTERS = 200


@dataclass
class TimedCall:
    """A function with the readings of its timed runs by round, and the results of its warm-up.

    ``restore_inputs`` runs before each run, outside the measured time. ``peak_memory`` is the largest number of bytes
    allocated on a CUDA device during a run. ``null`` does the work of a run without the function, and ``null_ms`` holds
    its times.
    """

    function: Callable[[], object]
    restore_inputs: Callable[[], object] = lambda: None
    warmup_runs: int = 0
    is_stable: bool = False
    last_ms: float = float("nan")
    rounds: list[list[Reading]] = field(default_factory=list)
    peak_memory: int | None = None
    null: Callable[[], object] | None = None
    null_ms: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> Overhead:
        """Constant cost of a run, which `wall_ms` does not contain."""
        return overhead_of(self.null_ms)

    @property
    def num_runs(self) -> int:
        """Number of timed runs so far."""
        return sum(map(len, self.rounds))

    def run(self) -> None:
        """Run once on restored inputs."""
        self.restore_inputs()
        self.function()

    def time(self, clock: Clock) -> Reading:
        """Time one run on restored inputs."""
        self.restore_inputs()
        return clock.time(self.function)

    def wall_ms(self) -> list[list[float]]:
        """Return the wall times by round, without the constant cost of a run."""
        cost = self.overhead.ms
        return [[max(reading.wall_ms - cost, _LEAST_MS) for reading in readings] for readings in self.rounds]

    def time_null(self, clock: Clock) -> None:
        """Time the constant cost of a run, with a first run for the caches."""
        if self.null is None:
            return
        for _ in range(2):
            if isinstance(self.null, Call):
                self.null.restore_inputs()
            reading = clock.time(self.null)
        self.null_ms.append(reading.wall_ms)


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error: messages of compilers and allocators are long."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = [f"{lines[0]} {lines[1]}"]  # the error of a backend of torch.compile
    return f"{type(error).__name__}: {lines[0][:_MOST_LETTERS]}" if lines else type(error).__name__


def warm_up_all(calls: Mapping[Any, TimedCall], clock: Clock, plan: TimingPlan, tick: Callable[[], None]) -> float:
    """Warm up all calls within half of the time of a batch size, or with one run each if that takes longer.

    Returns:
        Remaining seconds of the batch size: at least half of its time.
    """
    start = time.perf_counter()
    seconds = plan.seconds_per_size / (2 * max(len(calls), 1))
    for call in calls.values():
        tick()
        _warm_up(call, clock, plan, seconds)
        if clock.device.type == "cuda":
            torch.cuda.synchronize(clock.device)
            torch.cuda.reset_peak_memory_stats(clock.device)
            call.run()
            torch.cuda.synchronize(clock.device)
            call.peak_memory = torch.cuda.max_memory_allocated(clock.device)
    return max(plan.seconds_per_size - (time.perf_counter() - start), plan.seconds_per_size / 2)


def _warm_up(call: TimedCall, clock: Clock, plan: TimingPlan, seconds: float) -> None:
    """Run a call as often as given, or until its last five runs agree with the five before or the time is over."""
    times: list[float] = []
    start = time.perf_counter()
    while plan.warmup_runs is None or len(times) < plan.warmup_runs:
        times.append(call.time(clock).wall_ms)
        call.is_stable = _is_stable(times, plan.warmup_tolerance)
        if plan.warmup_runs is None and (call.is_stable or time.perf_counter() - start > seconds):
            break
    call.warmup_runs, call.last_ms = len(times), times[-1] if times else float("nan")


def _is_stable(times: list[float], tolerance: float) -> bool:
    if len(times) < 2 * _WINDOW:
        return False
    before, after = statistics.median(times[-2 * _WINDOW : -_WINDOW]), statistics.median(times[-_WINDOW:])
    return abs(after - before) <= tolerance * before


def take_turns(
    calls: Mapping[Any, TimedCall],
    clock: Clock,
    *,
    num_runs: int,
    seconds: float,
    order: random.Random,
    on_round: Callable[[float], None],
    is_over: Callable[[float], bool] = lambda round_s: False,
) -> None:
    """Run all calls in rounds, each round in a new random order, so that a slow phase affects all calls alike.

    A short call runs up to eight times per turn, after one unrecorded run. It then finds its own data in the caches and
    not that of another module. Rounds end after ``num_runs`` runs of each call, or after ``seconds`` and at least six
    rounds. ``on_round`` receives the completed fraction. ``is_over`` receives the seconds of the last round and returns
    whether to stop at once.
    """
    start, done, fewest = time.perf_counter(), 0, min(FEWEST_ROUNDS, num_runs)
    share = 0.0 if calls else 1.0
    while share < 1:
        begin = time.perf_counter()
        with _garbage_collection_disabled():
            for key in order.sample(list(calls), len(calls)):
                _take_turn(calls[key], clock, num_runs)
        done += 1
        runs = min(call.num_runs for call in calls.values())
        share = max(runs / num_runs, min((time.perf_counter() - start) / seconds, done / fewest))
        share = 1.0 if is_over(time.perf_counter() - begin) else share
        on_round(min(share, 1.0))


@contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """Collect garbage between rounds only, because it may be that of another call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _take_turn(call: TimedCall, clock: Clock, num_runs: int) -> None:
    remaining = num_runs - call.num_runs
    if remaining <= 0:
        return
    most = max(1, min(_MOST_REPEATS, num_runs // _ROUNDS_AT_LEAST))
    repeats = int(min(most, max(1.0, _TURN_MS / call.last_ms))) if call.last_ms > 0 else 1
    if call.last_ms < _TURN_MS:
        call.run()
    readings: list[Reading] = []
    # on a shared machine, a run may take many times as long as in the warm-up
    while len(readings) < min(repeats, remaining) and sum(r.wall_ms for r in readings) < _LONGEST_TURN_MS:
        readings.append(call.time(clock))
    call.rounds.append(readings)
    call.time_null(clock)
