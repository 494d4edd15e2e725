"""Warm-up until stable, and rounds in which everything that is compared takes turns in random order."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from moe_heads.analysis.inference_timing.clock import Clock, Sample

__all__ = ["FEWEST_ROUNDS", "Cache", "Contender", "take_turns", "warm_up"]

Key = TypeVar("Key", bound=Hashable)

Cache = Literal["warm", "cold"]
"""What the processor's caches hold before a run: what the run before left there, or something else."""

# With six independent runs the slowest and the fastest enclose the median at 97 %.
FEWEST_ROUNDS = 6
# Short calls run several times a turn, for as long as this or a share of the runs.
_TURN_MS = 2.0
_LONGEST_TURN_MS = 2 * _TURN_MS
_MOST_REPEATS = 8
_ROUNDS_AT_LEAST = 25
# Two windows of runs whose medians are compared.
_WINDOW = 5


@dataclass
class Contender:
    """A call and its times.

    Attributes:
        call: What is timed.
        cache: What the caches hold before a run.
        renew: Makes the inputs what they were, before each run and outside its time.
        warmup_runs: Runs of the warm-up.
        is_stable: Whether the last window of the warm-up was as fast as the one before.
        last_ms: Time of the last run of the warm-up.
        rounds: The runs, by round.
        peak_memory: Most bytes allocated on a CUDA device during a run; None elsewhere.
    """

    call: Callable[[], object]
    cache: Cache = "warm"
    renew: Callable[[], object] = lambda: None
    warmup_runs: int = 0
    is_stable: bool = False
    last_ms: float = float("nan")
    rounds: list[list[Sample]] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def num_runs(self) -> int:
        """Runs timed so far."""
        return sum(map(len, self.rounds))

    def run(self) -> None:
        """Run it once, on its inputs as they were."""
        self.renew()
        self.call()

    def timed(self, clock: Clock) -> Sample:
        """Time one run, on its inputs as they were."""
        self.renew()
        return clock.time(self.call)

    def wall_ms(self) -> list[list[float]]:
        """Wall times by round."""
        return [[sample.wall_ms for sample in samples] for samples in self.rounds]


def warm_up(contender: Contender, clock: Clock, *, num_runs: int | None, tolerance: float, seconds: float) -> None:
    """Run until the median of the last five runs is within a tolerance of the median of the five before.

    Args:
        contender: What to run; told how many runs it took, and whether it became stable.
        clock: The clock.
        num_runs: Exactly so many runs instead.
        tolerance: Largest relative difference of the two medians.
        seconds: Time after which to stop without.
    """
    times: list[float] = []
    start = time.perf_counter()
    while num_runs is None or len(times) < num_runs:
        times.append(contender.timed(clock).wall_ms)
        contender.is_stable = _is_stable(times, tolerance)
        if num_runs is None and (contender.is_stable or time.perf_counter() - start > seconds):
            break
    contender.warmup_runs, contender.last_ms = len(times), times[-1] if times else float("nan")


def _is_stable(times: list[float], tolerance: float) -> bool:
    if len(times) < 2 * _WINDOW:
        return False
    before, after = statistics.median(times[-2 * _WINDOW : -_WINDOW]), statistics.median(times[-_WINDOW:])
    return abs(after - before) <= tolerance * before


def take_turns(
    contenders: Mapping[Key, Contender],
    clock: Clock,
    *,
    num_runs: int,
    seconds: float,
    order: random.Random,
    on_round: Callable[[float], None],
    is_over: Callable[[float], bool] = lambda round_s: False,
) -> None:
    """Let all contenders run in rounds, each round in a new random order, so that a slow phase meets all of them alike.

    A call that is short runs up to eight times a turn, after once unrecorded, so that it finds the caches as it leaves
    them and not as a whole model does.

    Args:
        contenders: What is compared; their ``rounds`` are filled.
        clock: The clock.
        num_runs: Runs of each, if the time allows.
        seconds: Time after which no more round begins, unless there were fewer than six.
        order: Decides the orders.
        on_round: Called after each round with the share that is done.
        is_over: Asked after each round, given its seconds, whether to stop at once, with however few.
    """
    start, done, fewest = time.perf_counter(), 0, min(FEWEST_ROUNDS, num_runs)
    share = 0.0 if contenders else 1.0
    while share < 1:
        begin = time.perf_counter()
        with _no_garbage():
            for key in order.sample(list(contenders), len(contenders)):
                _take_turn(contenders[key], clock, num_runs)
        done += 1
        runs = min(contender.num_runs for contender in contenders.values())
        share = max(runs / num_runs, min((time.perf_counter() - start) / seconds, done / fewest))
        share = 1.0 if is_over(time.perf_counter() - begin) else share
        on_round(min(share, 1.0))


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Python's garbage is collected between the rounds: inside, it would be somebody else's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _take_turn(contender: Contender, clock: Clock, num_runs: int) -> None:
    wanted = num_runs - contender.num_runs
    if wanted <= 0:
        return
    if contender.cache == "cold":
        contender.renew()
        clock.cool()
        contender.rounds.append([clock.time(contender.call)])
        return
    most = max(1, min(_MOST_REPEATS, num_runs // _ROUNDS_AT_LEAST))
    repeats = int(min(most, max(1.0, _TURN_MS / contender.last_ms))) if contender.last_ms > 0 else 1
    if contender.last_ms < _TURN_MS:
        contender.run()
    samples: list[Sample] = []
    # a machine that others use may take many times as long as in the warm-up
    while len(samples) < min(repeats, wanted) and sum(sample.wall_ms for sample in samples) < _LONGEST_TURN_MS:
        samples.append(contender.timed(clock))
    contender.rounds.append(samples)
