"""The sweep over batch sizes: what is run at each of them, and what is left out for want of time or memory."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_heads.analysis._shared.microbatches import free_memory, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.inference_timing.calls import MODEL, Call
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.contenders import contenders_of, warm_up_all
from moe_heads.analysis.inference_timing.failures import out_of_memory, reason_of
from moe_heads.analysis.inference_timing.heads import belongs
from moe_heads.analysis.inference_timing.outlook import Outlook
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.power import Meter
from moe_heads.analysis.inference_timing.rounds import Contender, take_turns
from moe_heads.analysis.inference_timing.row import Key, Skipped
from moe_heads.analysis.inference_timing.subject import RefusedError, Subject, Taken

__all__ = ["Sweep"]

_STEPS_PER_SIZE = 100


@dataclass
class Sweep:
    """Runs the sizes one after the other, ascending.

    Args:
        subject: What is timed.
        plan: How.
        seed: Seed of the order of turns.
        progress: Shows the progress and ends the sweep in time.

    Attributes:
        skipped: What was not timed.
        power: Energy and clocks of a GPU.
    """

    subject: Subject
    plan: TimingPlan
    seed: int
    progress: Progress
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.power, self._clock = Meter(self.subject.device), Clock(self.subject.device)
        self._order, self._outlook = random.Random(self.seed), Outlook(self.plan, self.subject.device)
        self._refusal: Exception | None = None
        self._has_run = False
        self._done, self._total = 0, _STEPS_PER_SIZE * len(self.plan.batch_sizes)

    def take(self, size: int) -> Taken | None:
        """Run one batch size once; None where it is left out, for the reason in ``skipped``."""
        reason = self._outlook.why_no_pass(size)
        if reason:
            self._leave_out(size, reason)
            return None
        try:
            taken = self.subject.take(size)
        except RefusedError as refused:
            if not is_out_of_memory(refused.error):
                self._refusal = refused.error
            self._leave_out(size, reason_of(refused.error))
            return None
        self._has_run = True
        self._outlook.learn_pass(size, taken.seconds, taken.captured.num_bytes)
        self.skipped += taken.skipped
        return taken

    def check(self) -> None:
        """Make sure that the model took a batch size, if it refused some.

        Raises:
            ValueError: If it refused all of them.
        """
        error = self._refusal
        if error is not None and not self._has_run:
            raise ValueError(
                f"example_batch: expected a batch that the model takes; it failed with {type(error).__name__}: {error}"
            ) from error

    def time(self, size: int, calls: Mapping[str, Call]) -> dict[Key, Contender]:
        """Time the calls of one batch size that there is time for; empty where there is none, or where memory ends."""
        kept = self._affordable(size, calls)
        if not kept:
            return {}
        tick = self.progress.tick
        try:
            contenders, failed = contenders_of(
                size, kept, self.plan, self.subject.device, forgive=self._outlook.forgive, tick=tick
            )
            self.skipped += failed
            seconds = warm_up_all(contenders, self._clock, self.plan, tick)
            self._outlook.learn_round({key: contender.last_ms for key, contender in contenders.items()})
            with self.power.measured(size):
                take_turns(
                    contenders,
                    self._clock,
                    num_runs=self.plan.num_runs,
                    seconds=seconds,
                    order=self._order,
                    on_round=lambda share: self._show(size, share),
                    is_over=self._outlook.is_over,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._leave_out(size, out_of_memory(error))
            return {}
        self._done += _STEPS_PER_SIZE
        return contenders

    def _leave_out(self, size: int, reason: str) -> None:
        free_memory()
        self.skipped.append(Skipped(size, None, None, reason))
        self._done += _STEPS_PER_SIZE
        self.progress.step(self._done, self._total)

    def _show(self, size: int, share: float) -> None:
        # the last step is that of the whole
        done = self._done + int(share * (_STEPS_PER_SIZE - 1))
        self.progress.step(done + (share >= 1), self._total, batch_size=size)

    def _affordable(self, size: int, calls: Mapping[str, Call]) -> Mapping[str, Call]:
        """The calls that there is time for, now that a pass is known: all of them, those of heads, or none."""
        reason = self._outlook.why_no_rounds()
        if not reason:
            return calls
        heads = [head for head in self.subject.heads if head != MODEL]
        names = {self.subject.twin_names.get(head) for head in heads}
        kept = {
            name: call for name, call in calls.items() if name in names or any(belongs(name, head) for head in heads)
        }
        if kept:
            self.skipped += [Skipped(size, None, name, reason) for name in calls if name not in kept]
        else:
            self._outlook.give_up()
            self._leave_out(size, reason)
        return kept
