"""How a timing is to be done: sizes, modes, numbers of runs, and the time that it may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from moe_heads.analysis.inference_timing.rounds import FEWEST_ROUNDS, Cache
from moe_heads.analysis.inference_timing.row import TimingMode
from moe_heads.checks import check_at_least, check_at_least_one, check_choices, check_positive

__all__ = ["DEFAULT_SIZES", "TimingPlan"]

DEFAULT_SIZES = (1, 8, 32, 128, 256, 1024)


@dataclass(frozen=True)
class TimingPlan:
    """Options of a timing; see `inference_timing`."""

    batch_sizes: Sequence[int] = DEFAULT_SIZES
    modes: Sequence[TimingMode] = ("eager",)
    caches: Sequence[Cache] = ("warm",)
    num_runs: int = 1000
    warmup_runs: int | None = None
    warmup_tolerance: float = 0.05
    seconds_per_size: float = 0.8
    max_seconds: float = 50.0

    def __post_init__(self) -> None:
        sizes = self.batch_sizes if isinstance(self.batch_sizes, (list, tuple)) else ()
        check_at_least_one(**{f"batch_sizes[{place}]": size for place, size in enumerate(sizes)})
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"batch_sizes: expected a list of different whole numbers from 1 on, got {self.batch_sizes!r}"
            )
        check_choices("modes", self.modes, get_args(TimingMode))
        check_choices("caches", self.caches, get_args(Cache))
        check_at_least_one(num_runs=self.num_runs)
        check_at_least(0, or_none=True, warmup_runs=self.warmup_runs)
        for name in ("warmup_tolerance", "seconds_per_size", "max_seconds"):
            check_positive(**{name: getattr(self, name)})

    def why_not(self, needed: float, elapsed: float) -> str:
        """Why there is no time for something; "" if there is.

        Args:
            needed: Seconds that it will take.
            elapsed: Seconds that the sweep has taken.
        """
        left = self.max_seconds - elapsed
        if needed <= left:
            return ""
        return (
            f"may take about {needed:.3g} s, and {max(left, 0):.3g} s of max_seconds = {self.max_seconds:g} were left"
        )

    @property
    def main_cache(self) -> Cache:
        """What splits and gaps are of: warm caches where these are timed."""
        return "warm" if "warm" in self.caches else "cold"

    @property
    def fewest_rounds(self) -> int:
        """Rounds at least, with those to warm up."""
        return (1 if self.warmup_runs is None else self.warmup_runs) + min(FEWEST_ROUNDS, self.num_runs)
