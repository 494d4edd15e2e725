"""Sweep over batch sizes within limits of time and memory, and the record of its results."""

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moe_heads.analysis._shared.environment import Environment, load_average
from moe_heads.analysis._shared.microbatches import free_memory, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.inference_timing.calls import MODEL, Call, RowKey, TimingMode
from moe_heads.analysis.inference_timing.capture import Capture, TimedModel
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.cost import CostEstimate
from moe_heads.analysis.inference_timing.energy import EnergyMeter
from moe_heads.analysis.inference_timing.flops import OperatorLog, record
from moe_heads.analysis.inference_timing.measure import (
    TimedCall,
    first_line,
    take_turns,
    timed_calls,
    warm_up_all,
)
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow, row_of
from moe_heads.analysis.inference_timing.speedup import Bound, DeviceLimits, GapPoint, gap_of, realized_ratio
from moe_heads.analysis.inference_timing.stages import STAGES, Part, divided, part_name
from moe_heads.analysis.inference_timing.statistics import Rounds

__all__ = ["Sweep"]

_STEPS_PER_SIZE = 100
_NOT_EAGER = "no split and no roofline, because both require the mode eager"


@dataclass
class Sweep:
    """Sweep over batch sizes, and the rows, parts and speed ratios of the finished ones."""

    model: TimedModel
    plan: TimingPlan
    seed: int
    progress: Progress
    environment: Environment
    skipped: list[Skipped]

    def __post_init__(self) -> None:
        self._energy, self._clock = EnergyMeter(self.model.device), Clock(self.model.device)
        self._order, self._estimate = random.Random(self.seed), CostEstimate(self.plan)
        self._dtype = _dtype_of(self.model.model, self.model.device)
        self._limits: dict[torch.dtype, DeviceLimits] = {}
        self._error: Exception | None = None
        self._has_run, self._done, self._total = False, 0, _STEPS_PER_SIZE * len(self.plan.batch_sizes)
        self._uncounted: Mapping[str, int] = {}
        self._rows: list[TimingRow] = []
        self._parts: list[Part] = []
        self._points: dict[tuple[str, TimingMode], list[GapPoint]] = defaultdict(list)

    def add(self, size: int) -> None:
        """Time one batch size, or record why it is skipped. Sizes have to ascend."""
        captured = self._capture(size)
        if captured is None:
            return
        calls, flops = self.model.calls(size, captured), self.model.flops(captured)
        self.skipped += captured.skipped
        timed = self._time(size, calls)
        if MODEL in captured.operators:
            self._uncounted = captured.operators[MODEL].uncounted
        for key, call in timed.items():
            limits = self._limits_of(key.mode)
            self._rows.append(row_of(size, key, call, flops.get(key.module), limits.peak_flops if limits else None))
        self._divide(size, timed)
        for name, mode in itertools.product(self.model.twins, self.plan.modes):
            twin, head = RowKey(self.model.twin_name(name), mode), RowKey(name, mode)
            if twin in timed and head in timed:
                theoretical = flops[twin.module].value / flops[name].value
                realized = realized_ratio(timed[twin].wall_ms(), timed[head].wall_ms(), self.seed)
                bounds = self._bounds(calls[twin.module], captured.operators.get(name)) if mode == "eager" else ()
                self._points[name, mode].append(GapPoint(size, mode, theoretical, *realized, *bounds))

    def check(self) -> None:
        """Check that the model ran at one batch size at least, or failed only for lack of memory.

        Raises:
            ValueError: If it did not.
        """
        error = self._error
        if error is not None and not self._has_run:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"example_batch: expected a batch that the model accepts, got one that raises {found}"
            ) from error

    def result(self, partial: str = "") -> InferenceTimingResult:
        """Return the result of the finished sizes."""
        limits = self._limits.get(self._dtype)
        absent = [] if "eager" in self.plan.modes else [Skipped(None, None, None, _NOT_EAGER)]
        return InferenceTimingResult(
            rows=tuple(self._rows),
            environment=self.environment,
            warmup_runs=max((row.warmup_runs for row in self._rows), default=0),
            seed=self.seed,
            partial=partial,
            skipped=(*self.skipped, *absent),
            parts=tuple(self._parts),
            gaps=tuple(
                gap_of(name, mode, (self.model.heads[name], self.model.twins[name]), points)
                for (name, mode), points in self._points.items()
            ),
            power=tuple(self._energy.uses),
            uncounted=self._uncounted,
            peak_flops=limits.peak_flops if limits else None,
            launch_ms=limits.launch_ms if limits else None,
            bandwidths=dict(limits.bandwidths) if limits else {},
            load_average_end=load_average(),
            plan=self.plan,
        )

    def _capture(self, size: int) -> Capture | None:
        """Run one batch size once; return None if there is no time for it or it fails."""
        reason = self._estimate.why_no_pass(size)
        if reason:
            self._skip(size, reason)
            return None
        try:
            captured = self.model.capture(size)
        except TimeUp:
            raise
        except Exception as error:
            # the model and forward_fn may raise any error
            is_memory = is_out_of_memory(error)
            self._error = self._error if is_memory else error
            self._skip(size, f"{'out of memory:' if is_memory else 'failed with'} {first_line(error)}")
            return None
        self._has_run = True
        self._estimate.add_pass(size, captured.seconds)
        return captured

    def _time(self, size: int, calls: Mapping[str, Call]) -> dict[RowKey, TimedCall]:
        """Time the calls of a batch size for which there is time; return {} if there is none, or too little memory."""
        calls, tick = self._affordable(size, calls), self.progress.tick
        if not calls:
            return {}
        try:
            timed, failed = timed_calls(
                calls, self.plan.modes, self.model.device, exclude=self._estimate.exclude, tick=tick
            )
            self.skipped += [Skipped(size, key.mode, key.module, reason) for key, reason in failed.items()]
            seconds = warm_up_all(timed, self._clock, self.plan, tick)
            self._estimate.add_round({key: call.last_ms for key, call in timed.items()})
            with self._energy.measure(size):
                take_turns(
                    timed,
                    self._clock,
                    num_runs=self.plan.num_runs,
                    seconds=seconds,
                    order=self._order,
                    on_round=lambda share: self._show(size, share),
                    is_over=self._estimate.is_over,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._skip(size, f"out of memory: {first_line(error)}")
            return {}
        self._done += _STEPS_PER_SIZE
        return timed

    def _affordable(self, size: int, calls: Mapping[str, Call]) -> Mapping[str, Call]:
        """Return the calls for which there is time: all of them, those of the heads, or none."""
        reason = self._estimate.why_no_rounds()
        if not reason:
            return calls
        heads = tuple(head for head in self.model.heads if head != MODEL)
        names = {*heads, *map(self.model.twin_name, heads)}
        inside = tuple(f"{head}." for head in heads)
        kept = {name: call for name, call in calls.items() if name in names or name.startswith(inside)}
        if kept:
            self.skipped += [Skipped(size, None, name, reason) for name in calls if name not in kept]
        else:
            self._estimate.stop()
            self._skip(size, reason)
        return kept

    def _skip(self, size: int, reason: str) -> None:
        free_memory()
        self.skipped.append(Skipped(size, None, None, reason))
        self._done += _STEPS_PER_SIZE
        self.progress.step(self._done, self._total)

    def _show(self, size: int, share: float) -> None:
        # only the last round completes the steps of the size
        done = self._done + int(share * (_STEPS_PER_SIZE - 1))
        self.progress.step(done + (share >= 1), self._total, batch_size=size)

    def _divide(self, size: int, timed: Mapping[RowKey, TimedCall]) -> None:
        """Divide the times of the model and of its heads between their parts, in eager mode."""
        rounds = {key.module: call.wall_ms() for key, call in timed.items() if key.mode == "eager"}
        outer: dict[str, Rounds] = {name: rounds[name] for name in ("backbone", "head") if name in rounds}
        if outer and MODEL in rounds:
            self._parts += divided(size, MODEL, rounds[MODEL], outer, "rest", self.seed)
        for head in self.model.heads:
            rows = {name: part_name(head, name) for name in STAGES}
            inner = {name: rounds[row] for name, row in rows.items() if row in rounds}
            if head in rounds and "router" in inner:
                self._parts += divided(size, head, rounds[head], inner, "experts", self.seed)

    def _bounds(self, twin: Call, head: OperatorLog | None) -> tuple[float, Bound, Bound] | tuple[()]:
        """Return the ratio of the least times of the twin and of the head, and both, if all operators are known."""
        limits = self._limits_of("eager")
        twin.restore_inputs()
        dense = record(twin)
        if limits is None or head is None or head.num_hidden or dense.num_hidden:
            return ()
        dense_bound, head_bound = limits.bound(dense.operators), limits.bound(head.operators)
        return dense_bound.ms / head_bound.ms, dense_bound, head_bound

    def _limits_of(self, mode: TimingMode) -> DeviceLimits | None:
        dtype = torch.bfloat16 if mode == "bf16" else self._dtype
        if self.model.device.type not in {"cpu", "cuda"}:
            return None
        return self._limits.setdefault(dtype, DeviceLimits(self.model.device, dtype))


def _dtype_of(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the data type of the caller's arithmetic."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
