"""Options of a timing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from moe_heads.analysis.inference_timing.calls import TimingMode
from moe_heads.checks import check_at_least, check_at_least_one, check_choices, check_positive

__all__ = ["DEFAULT_SIZES", "FEWEST_ROUNDS", "TimingPlan"]

DEFAULT_SIZES = (1, 8, 32, 128, 256, 1024)

# The slowest and the fastest of six independent runs enclose the median with probability 97 %.
FEWEST_ROUNDS = 6


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
    num_draws: int | None = None

    def __post_init__(self) -> None:
        sizes = self.batch_sizes if isinstance(self.batch_sizes, (list, tuple)) else ()
        check_at_least_one(**{f"batch_sizes[{place}]": size for place, size in enumerate(sizes)})
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(f"batch_sizes: expected a list of distinct positive integers, got {self.batch_sizes!r}")
        check_choices("modes", self.modes, get_args(TimingMode))
        check_at_least_one(num_runs=self.num_runs)
        check_at_least(0, or_none=True, warmup_runs=self.warmup_runs)
        check_at_least(1, or_none=True, num_draws=self.num_draws)
        for name in ("warmup_tolerance", "seconds_per_size", "max_seconds"):
            check_positive(**{name: getattr(self, name)})

    @property
    def fewest_rounds(self) -> int:
        """Smallest number of rounds of a batch size, including the warm-up."""
        return (1 if self.warmup_runs is None else self.warmup_runs) + min(FEWEST_ROUNDS, self.num_runs)
