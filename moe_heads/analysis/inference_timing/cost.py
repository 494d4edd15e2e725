"""Estimate of the time of a batch size, so that a sweep stays within its limit."""

import time
from collections.abc import Mapping, Sequence

from moe_heads.analysis.inference_timing.calls import MODEL, RowKey
from moe_heads.analysis.inference_timing.plan import TimingPlan

__all__ = ["CostEstimate"]

# on a shared machine, a pass may take twice as long as its estimate
_CAUTION = 2


class CostEstimate:
    """Estimate of the time of a batch size from the size before: time grows at most in proportion to the size."""

    def __init__(self, plan: TimingPlan) -> None:
        self._plan, self._start = plan, time.perf_counter()
        self._size, self._pass_s, self._passes_per_round = 0, 0.0, 1.0
        self._too_slow, self._num_sizes = "", 0

    def why_no_pass(self, size: int) -> str:
        """Return why there is no time for one pass of a size, or "". The first size always runs."""
        if not self._num_sizes or self._too_slow:
            return self._too_slow
        return self._why_not(_CAUTION * self._pass_s * size / self._size)

    def why_no_rounds(self) -> str:
        """Return why there is no time for the rounds of the current size, or "". The first size always has them."""
        if self._num_sizes == 1:
            return ""
        return self._why_not(self._plan.fewest_rounds * self._passes_per_round * self._pass_s)

    def add_pass(self, size: int, seconds: float) -> None:
        """Add the duration of the first pass of a size."""
        self._size, self._pass_s = size, seconds
        self._num_sizes += 1

    def add_round(self, last_ms: Mapping[RowKey, Sequence[float]]) -> None:
        """Add the times of all calls by draw after the warm-up (nan if it was skipped).

        The first pass may have been slow.
        """
        known = {key: [ms for ms in draws if ms > 0] for key, draws in last_ms.items()}
        known = {key: draws for key, draws in known.items() if draws}
        if any(key.module == MODEL for key in known):
            of_model = known.get(RowKey(MODEL), [1e3 * self._pass_s])
            eager = sum(of_model) / len(of_model)
            self._pass_s = min(self._pass_s, eager / 1e3)
            self._passes_per_round = sum(map(sum, known.values())) / eager

    def stop(self) -> None:
        """Skip all larger sizes, because the current one was too slow."""
        self._too_slow = f"batch size {self._size} was already too slow"

    def is_over(self, round_s: float) -> bool:
        """Return whether no further round fits that takes as long as the last one. The first size always continues."""
        return self._num_sizes > 1 and self._elapsed() + round_s > self._plan.max_seconds

    def exclude(self, seconds: float) -> None:
        """Exclude some of the elapsed time from the limit."""
        self._start += seconds

    def _why_not(self, needed: float) -> str:
        left = self._plan.max_seconds - self._elapsed()
        if needed <= left:
            return ""
        limit = self._plan.max_seconds
        return f"needs about {needed:.3g} s, but {max(left, 0):.3g} s of max_seconds = {limit:g} remain"

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start
