"""What the batch sizes so far say about the next one: whether there are time and memory for it."""

import time
from collections.abc import Mapping

import torch

from moe_heads.analysis._shared.memory import memory_budget
from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.row import Key

__all__ = ["Outlook"]

# kernels take memory of their own, such as the columns of a convolution: as much again
_WORKSPACE = 2
# on a machine that others use, a pass may take twice as long as the last one says
_CAUTION = 2


class Outlook:
    """Foretells what a batch size costs from the size before: time and memory grow at most in proportion.

    Args:
        plan: The time that there is.
        device: Where the memory is.
    """

    def __init__(self, plan: TimingPlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._start = time.perf_counter()
        self._size, self._pass_s, self._num_bytes = 0, 0.0, 0
        self._passes_per_round, self._too_slow, self._num_sizes = 1.0, "", 0

    def why_no_pass(self, size: int) -> str:
        """Why not even one pass of a size is to run; "" if it is. The first one always is."""
        if not self._num_sizes or self._too_slow:
            return self._too_slow
        growth = size / self._size
        needed = int(_WORKSPACE * self._num_bytes * growth)
        free = memory_budget(self._device, on_cpu=2**62, share_of_gpu=1.0)
        if needed > free:
            return f"would need about {needed / 2**30:.3g} GiB of memory, and {free / 2**30:.3g} may be used"
        return self._plan.why_not(_CAUTION * self._pass_s * growth, self._elapsed())

    def why_no_rounds(self) -> str:
        """Why there is no time for the rounds of the size whose pass was learned last; "" if there is.

        The smallest size always has them.
        """
        if self._num_sizes == 1:
            return ""
        rounds = self._plan.fewest_rounds * self._passes_per_round
        return self._plan.why_not(rounds * self._pass_s, self._elapsed())

    def learn_pass(self, size: int, seconds: float, num_bytes: int) -> None:
        """Remember what one pass of a size took."""
        self._size, self._pass_s, self._num_bytes = size, seconds, num_bytes
        self._num_sizes += 1

    def learn_round(self, last_ms: Mapping[Key, float]) -> None:
        """Remember what a round and a pass take that are warm: the first pass may have met a stall.

        Args:
            last_ms: Time of each that takes turns; nan where it was not warmed up.
        """
        known = {key: ms for key, ms in last_ms.items() if ms > 0}
        if any(key.module == MODEL for key in known):
            eager = min((ms for key, ms in known.items() if key[:2] == (MODEL, "eager")), default=1e3 * self._pass_s)
            self._pass_s = min(self._pass_s, eager / 1e3)
            self._passes_per_round = sum(known.values()) / eager

    def give_up(self) -> None:
        """Let no larger size run: the last one took too long."""
        self._too_slow = f"batch {self._size} was too slow already"

    def is_over(self, round_s: float) -> bool:
        """Whether there is no time for one more round, which takes as long as the last; the smallest size apart.

        Args:
            round_s: Seconds of the last round. Rounds may take longer than foretold.
        """
        return self._num_sizes > 1 and self._elapsed() + round_s > self._plan.max_seconds

    def forgive(self, seconds: float) -> None:
        """Do not count some of the time that has passed."""
        self._start += seconds

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start
