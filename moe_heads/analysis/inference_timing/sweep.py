"""Sweep over batch sizes within limits of time and memory, and the record of its results."""

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moe_heads.analysis._shared.environment import Environment, load_average
from moe_heads.analysis._shared.microbatches import free_memory, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.inference_timing.calls import MODEL, Call, RowKey, RowMode
from moe_heads.analysis.inference_timing.capture import TimedModel
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.cost import CostEstimate
from moe_heads.analysis.inference_timing.draws import DrawnRounds
from moe_heads.analysis.inference_timing.energy import EnergyMeter
from moe_heads.analysis.inference_timing.flops import OperatorLog, record
from moe_heads.analysis.inference_timing.limits import Bound, DeviceLimits, dtype_of
from moe_heads.analysis.inference_timing.measure import (
    TimedCall,
    first_line,
    take_turns,
    warm_up_all,
)
from moe_heads.analysis.inference_timing.overhead import null_of
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.prepare import timed_calls
from moe_heads.analysis.inference_timing.recording import Capture
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow, row_of
from moe_heads.analysis.inference_timing.served import ServedPrograms
from moe_heads.analysis.inference_timing.speedup import Gap, GapPoint, WiderHead, gap_of, realized_ratio
from moe_heads.analysis.inference_timing.stages import STAGES, Part, divided, part_name
from moe_heads.analysis.inference_timing.wider import wider_heads

__all__ = ["Sweep"]

_STEPS_PER_SIZE = 100
# theoretical speedup from which on a wider head can be faster: a dense head of equal capacity may differ by 5 %
_FEWER_OPERATIONS = 1.1
_NOT_EAGER = "no split and no roofline, because both require the mode eager"
_COMPILED = "no split, because a compiled program fuses what its parts do alone"


@dataclass
class Sweep:
    """Sweep over batch sizes, and the rows, parts and speed ratios of the finished ones."""

    model: TimedModel
    plan: TimingPlan
    seed: int
    progress: Progress
    environment: Environment
    skipped: list[Skipped]
    served: ServedPrograms

    def __post_init__(self) -> None:
        self._energy, self._clock = EnergyMeter(self.model.device), Clock(self.model.device)
        self._order, self._estimate = random.Random(self.seed), CostEstimate(self.plan)
        self._dtype = dtype_of(self.model.model, self.model.device)
        self._limits: dict[torch.dtype, DeviceLimits] = {}
        self._error: Exception | None = None
        self._has_run, self._done, self._total = False, 0, _STEPS_PER_SIZE * len(self.plan.batch_sizes)
        self._uncounted: Mapping[str, int] = {}
        self._rows: list[TimingRow] = []
        self._parts: list[Part] = []
        self._points: dict[tuple[str, RowMode], list[GapPoint]] = defaultdict(list)
        self._calls_of_heads: dict[str, Call] = {}
        self._wider: dict[str, tuple[WiderHead, ...]] = {}

    def add(self, size: int) -> None:
        """Time one batch size, or record why it is skipped. Sizes have to ascend."""
        captured = self._capture(size)
        if not captured:
            return
        of_draws = [self.model.calls(size, draw) for draw in captured]
        # a call that fails on one draw is left out
        calls = {name: [draw[name] for draw in of_draws] for name in of_draws[0] if all(name in d for d in of_draws)}
        flops = [self.model.flops(draw) for draw in captured]
        self.skipped += captured[0].skipped
        served, absent = self.served.calls(size, [draw.forward for draw in captured])
        self.skipped += absent
        timed = self._time(size, calls, served)
        if MODEL in captured[0].operators:
            self._uncounted = captured[0].operators[MODEL].uncounted
        for key, draws in timed.items():
            limits, counts = self._limits_of(key.mode), [draw.get(key.module) for draw in flops]
            self._rows.append(row_of(size, key, draws, counts, limits.peak_flops if limits else None, self.seed))
        self._divide(size, timed)
        own = RowKey(MODEL, self.model.mode_of(MODEL))
        if own in timed:
            programs = {key.module: draws for key, draws in timed.items() if key.mode == "served"}
            times = {name: [call.wall_ms() for call in draws] for name, draws in programs.items()}
            self.served.compare(size, [call.wall_ms() for call in timed[own]], times, self.seed)
        for head in [key for key in timed if key.module in self.model.twins]:
            name, mode = head
            twin = RowKey(self.model.twin_name(name), mode)
            if twin in timed:
                theoretical = sum(d[twin.module].value for d in flops) / sum(d[name].value for d in flops)
                dense_ms, head_ms = ([call.wall_ms() for call in timed[key]] for key in (twin, head))
                realized = realized_ratio(dense_ms, head_ms, self.seed)
                operators = [draw.operators.get(name) for draw in captured]
                bounds: tuple[float, Bound, Bound] | tuple[()] = ()
                if mode == "eager":
                    bounds, self._calls_of_heads[name] = (
                        self._bounds(calls[twin.module], operators),
                        captured[0].modules[name],
                    )
                self._points[name, mode].append(GapPoint(size, mode, theoretical, *realized, *bounds))

    def widen(self) -> None:
        """Time wider heads at the largest batch size, where a head has fewer operations and is not faster."""
        for gap in self._gaps():
            last = gap.points[-1]
            if gap.mode != "eager" or last.theoretical < _FEWER_OPERATIONS or last.standing(gap.allowance) == "faster":
                continue
            found: list[WiderHead] = []
            for wider in wider_heads(
                self.model.heads[gap.head],
                self._calls_of_heads[gap.head],
                self._clock,
                self.plan,
                batch_size=last.batch_size,
                seed=self.seed,
                tick=self.progress.tick,
            ):
                found.append(wider)
                self._wider[gap.head] = tuple(found)
                if wider.low > 1 + gap.allowance or self._estimate.is_over(0.0):
                    break

    def check(self) -> None:
        """Check that the model ran at one batch size at least, or failed only for lack of memory.

        Raises:
            ValueError: If it did not.
        """
        error = self._error
        if error is not None and not self._has_run:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"example_batch: expected a batch that the model accepts, got one that raises {found.rstrip('.')}. If a"
                " request takes other arguments, pass forward_fn=lambda model, batch: ... with its call."
            ) from error

    def result(self, partial: str = "") -> InferenceTimingResult:
        """Return the result of the finished sizes."""
        limits = self._limits.get(self._dtype)
        absent = [] if "eager" in self.plan.modes else [Skipped(None, None, None, _NOT_EAGER)]
        if self.model.mode_of(MODEL) != "eager":
            absent = [Skipped(None, None, None, _COMPILED)]
        return InferenceTimingResult(
            rows=tuple(self._rows),
            environment=self.environment,
            warmup_runs=max((row.warmup_runs for row in self._rows), default=0),
            seed=self.seed,
            partial=partial,
            skipped=(*self.skipped, *absent),
            parts=tuple(self._parts),
            gaps=tuple(
                replace(gap, wider=self._wider.get(gap.head, ())) if gap.mode == "eager" else gap
                for gap in self._gaps()
            ),
            power=tuple(self._energy.uses),
            uncounted=self._uncounted,
            peak_flops=limits.peak_flops if limits else None,
            launch_ms=limits.launch_ms if limits else None,
            bandwidths=dict(limits.bandwidths) if limits else {},
            load_average_end=load_average(),
            plan=self.plan,
            requests=self.model.requests.report(),
            served=self.served.reports(),
        )

    def _gaps(self) -> list[Gap]:
        return [
            gap_of(name, mode, (self.model.heads[name], self.model.twins[name]), points)
            for (name, mode), points in self._points.items()
        ]

    def _capture(self, size: int) -> list[Capture]:
        """Run each draw of a batch size once; return [] if there is no time for it or it fails."""
        reason = self._estimate.why_no_pass(size)
        if reason:
            self._skip(size, reason)
            return []
        try:
            start = time.perf_counter()
            batches = self.model.requests.draws(size)
            self._estimate.exclude(time.perf_counter() - start)
            captured = [self.model.capture(size, batch) for batch in batches]
        except TimeUp:
            raise
        except Exception as error:
            # the model and forward_fn may raise any error
            is_memory = is_out_of_memory(error)
            self._error = self._error if is_memory else error
            self._skip(size, f"{'out of memory:' if is_memory else 'failed with'} {first_line(error)}")
            return []
        self._has_run = True
        self._estimate.add_pass(size, min(draw.seconds for draw in captured))
        return captured

    def _time(
        self, size: int, calls: Mapping[str, list[Call]], served: Mapping[str, list[Call]]
    ) -> dict[RowKey, list[TimedCall]]:
        """Time the calls of a batch size for which there is time; return {} if there is none, or too little memory."""
        calls, tick = self._affordable(size, calls), self.progress.tick
        if not calls:
            return {}
        try:
            timed, failed = timed_calls(
                calls, self.plan.modes, self.model.device, self.model, exclude=self._estimate.exclude, tick=tick
            )
            self.skipped += [Skipped(size, key.mode, key.module, reason) for key, reason in failed.items()]
            if MODEL in calls:  # else there is time for the heads only
                device = self.model.device
                timed |= {
                    RowKey(name, "served"): [TimedCall(call, null=null_of(call, device)) for call in draws]
                    for name, draws in served.items()
                }
            flat = {(key, place): call for key, draws in timed.items() for place, call in enumerate(draws)}
            seconds = warm_up_all(flat, self._clock, self.plan, tick)
            self._estimate.add_round({key: [call.last_ms for call in draws] for key, draws in timed.items()})
            with self._energy.measure(size):
                take_turns(
                    flat,
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

    def _affordable(self, size: int, calls: Mapping[str, list[Call]]) -> Mapping[str, list[Call]]:
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

    def _divide(self, size: int, timed: Mapping[RowKey, list[TimedCall]]) -> None:
        """Divide the times of the model and of its heads between their parts, in eager mode."""
        rounds: dict[str, DrawnRounds] = {
            key.module: [call.wall_ms() for call in draws] for key, draws in timed.items() if key.mode == "eager"
        }
        outer: dict[str, DrawnRounds] = {name: rounds[name] for name in ("backbone", "head") if name in rounds}
        if outer and MODEL in rounds:
            self._parts += divided(size, MODEL, rounds[MODEL], outer, "rest", self.seed)
        for head in self.model.heads:
            rows = {name: part_name(head, name) for name in STAGES}
            inner = {name: rounds[row] for name, row in rows.items() if row in rounds}
            if head in rounds and "router" in inner:
                self._parts += divided(size, head, rounds[head], inner, "experts", self.seed)

    def _bounds(
        self, twin: Sequence[Call], head: Sequence[OperatorLog | None]
    ) -> tuple[float, Bound, Bound] | tuple[()]:
        """Return the ratio of the least times of the twin and of the head, and both, if all operators are known.

        The times are means over the draws.
        """
        limits, bounds = self._limits_of("eager"), []
        for call in twin:
            call.restore_inputs()
        for logs in ([record(call) for call in twin], head):
            if limits is None or any(log is None or log.num_hidden for log in logs):
                return ()
            whole = limits.bound([operator for log in logs if log is not None for operator in log.operators])
            bounds.append(replace(whole, ms=whole.ms / len(logs), launches_ms=whole.launches_ms / len(logs)))
        return bounds[0].ms / bounds[1].ms, bounds[0], bounds[1]

    def _limits_of(self, mode: RowMode) -> DeviceLimits | None:
        dtype = torch.bfloat16 if mode == "bf16" else self._dtype
        if self.model.device.type not in {"cpu", "cuda"}:
            return None
        return self._limits.setdefault(dtype, DeviceLimits(self.model.device, dtype))
