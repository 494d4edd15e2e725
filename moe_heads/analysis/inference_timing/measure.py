"""Measurement of calls: options, clock, warm-up until stable, and interleaved rounds in random order."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch

from moe_heads.analysis._shared.environment import synchronize
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.inference_timing.calls import Call, ModeUnavailableError, RowKey, TimingMode, in_mode
from moe_heads.checks import check_at_least, check_at_least_one, check_choices, check_positive
from moe_heads.routing import Router

__all__ = [
    "DEFAULT_SIZES",
    "Clock",
    "TimedCall",
    "TimingPlan",
    "first_line",
    "take_turns",
    "timed_calls",
    "warm_up_all",
]

DEFAULT_SIZES = (1, 8, 32, 128, 256, 1024)

# The slowest and the fastest of six independent runs enclose the median with probability 97 %.
_FEWEST_ROUNDS = 6
# A short call runs several times per turn, for this long or up to a share of its runs.
_TURN_MS = 2.0
_LONGEST_TURN_MS = 2 * _TURN_MS
_MOST_REPEATS = 8
_ROUNDS_AT_LEAST = 25
# runs in each of the two windows whose medians the warm-up compares
_WINDOW = 5
_MOST_LETTERS = 200


@dataclass(frozen=True)
class TimingPlan:
    """Options of a timing; see `inference_timing`."""

    batch_sizes: Sequence[int] = DEFAULT_SIZES
    modes: Sequence[TimingMode] = ("eager",)
    num_runs: int = 1000
    warmup_runs: int | None = None
    warmup_tolerance: float = 0.05
    seconds_per_size: float = 0.8
    max_seconds: float = 50.0

    def __post_init__(self) -> None:
        sizes = self.batch_sizes if isinstance(self.batch_sizes, (list, tuple)) else ()
        check_at_least_one(**{f"batch_sizes[{place}]": size for place, size in enumerate(sizes)})
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(f"batch_sizes: expected a list of distinct positive integers, got {self.batch_sizes!r}")
        check_choices("modes", self.modes, get_args(TimingMode))
        check_at_least_one(num_runs=self.num_runs)
        check_at_least(0, or_none=True, warmup_runs=self.warmup_runs)
        for name in ("warmup_tolerance", "seconds_per_size", "max_seconds"):
            check_positive(**{name: getattr(self, name)})

    @property
    def fewest_rounds(self) -> int:
        """Smallest number of rounds of a batch size, including the warm-up."""
        return (1 if self.warmup_runs is None else self.warmup_runs) + min(_FEWEST_ROUNDS, self.num_runs)


class Reading(NamedTuple):
    """Duration of one run: milliseconds of wall time, and of time on the stream of a CUDA device (else nan)."""

    wall_ms: float
    device_ms: float


class Clock:
    """Clock for single runs on one device.

    On a CUDA device, the wall time includes the launches and the final synchronization. The device time between two
    events does not, and is shorter where the host is slower than the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def time(self, function: Callable[[], object]) -> Reading:
        """Run the function once between two synchronizations."""
        first, last = self._events or (None, None)
        synchronize(self.device)
        start = time.perf_counter_ns()
        if first is not None:
            first.record()
        function()
        if last is not None:
            last.record()
        synchronize(self.device)
        # never zero, whatever the resolution of the clock
        wall_ms = max(time.perf_counter_ns() - start, 1) / 1e6
        return Reading(wall_ms, float("nan") if first is None or last is None else first.elapsed_time(last))


@dataclass
class TimedCall:
    """A function with the readings of its timed runs by round, and the results of its warm-up.

    ``restore_inputs`` runs before each run, outside the measured time. ``peak_memory`` is the largest number of bytes
    allocated on a CUDA device during a run.
    """

    function: Callable[[], object]
    restore_inputs: Callable[[], object] = lambda: None
    warmup_runs: int = 0
    is_stable: bool = False
    last_ms: float = float("nan")
    rounds: list[list[Reading]] = field(default_factory=list)
    peak_memory: int | None = None

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
        """Return the wall times by round."""
        return [[reading.wall_ms for reading in readings] for readings in self.rounds]


def timed_calls(
    calls: Mapping[str, Call],
    modes: Sequence[TimingMode],
    device: torch.device,
    *,
    exclude: Callable[[float], None],
    tick: Callable[[], None],
) -> tuple[dict[RowKey, TimedCall], dict[RowKey, str]]:
    """Prepare every call in every mode; routers and stages run in eager mode only.

    ``exclude`` receives the seconds of compilation and graph capture. ``tick`` is called after each preparation.

    Returns:
        The prepared calls, and the reasons why others are unavailable.
    """
    prepared: dict[RowKey, TimedCall] = {}
    failed: dict[RowKey, str] = {}
    for mode in modes:
        for name, call in calls.items():
            if mode != "eager" and (isinstance(call.function, Router) or call.is_stage):
                continue
            start = time.perf_counter()
            try:
                call.restore_inputs()
                run = in_mode(mode, call, device)
                if mode != "eager":
                    run()  # bf16 and channels_last fail in their first run, if at all
                    call.restore_inputs()
            except Exception as error:
                # compilers, graph captures and kernels raise many kinds of errors, and each means: mode unavailable
                if is_out_of_memory(error):
                    raise
                is_known = isinstance(error, ModeUnavailableError)
                failed[RowKey(name, mode)] = str(error) if is_known else first_line(error)
                continue
            finally:
                exclude(time.perf_counter() - start)
            tick()
            restore = run.restore_inputs if isinstance(run, Call) else call.restore_inputs
            prepared[RowKey(name, mode)] = TimedCall(run, restore)
    return prepared, failed


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error: messages of compilers and allocators are long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_MOST_LETTERS]}" if lines else type(error).__name__


def warm_up_all(calls: Mapping[RowKey, TimedCall], clock: Clock, plan: TimingPlan, tick: Callable[[], None]) -> float:
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
    start, done, fewest = time.perf_counter(), 0, min(_FEWEST_ROUNDS, num_runs)
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
