"""What a sweep has found so far: rows, splits and gaps, batch size by batch size."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from moe_heads.callbacks.functional.common.environment import Environment, load_average
from moe_heads.callbacks.functional.timing.calls import MODEL, Call
from moe_heads.callbacks.functional.timing.counting import Counted, count
from moe_heads.callbacks.functional.timing.gap import Gap, GapPoint, break_even, realised_ratio
from moe_heads.callbacks.functional.timing.heads import active_flops, routed_heads, twin_name
from moe_heads.callbacks.functional.timing.intervals import Rounds
from moe_heads.callbacks.functional.timing.result import InferenceTimingResult
from moe_heads.callbacks.functional.timing.roofline import Limits
from moe_heads.callbacks.functional.timing.rounds import Contender
from moe_heads.callbacks.functional.timing.row import Key, TimingMode, TimingRow, row_of
from moe_heads.callbacks.functional.timing.split import Part, split
from moe_heads.callbacks.functional.timing.sweep import Sweep
from moe_heads.capacity import capacity

__all__ = ["Findings"]

# the stages of a head, in the order in which they run; the experts are what these leave of it
_STAGES = ("router", "dispatch", "combine")


class Findings:
    """Adds batch sizes up to a result.

    Args:
        sweep: Runs them.
        environment: The environment before them.
    """

    def __init__(self, sweep: Sweep, environment: Environment) -> None:
        self._sweep, self._environment = sweep, environment
        self._heads = routed_heads(sweep.subject.named)
        self._dtype = _dtype_of(sweep.subject.model, sweep.subject.device)
        self._limits: dict[torch.dtype, Limits] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._uncounted: Mapping[str, int] = {}
        self._rows: list[TimingRow] = []
        self._parts: list[Part] = []
        self._points: dict[tuple[str, TimingMode], list[GapPoint]] = defaultdict(list)

    def add(self, size: int) -> None:
        """Time one batch size, or note why not."""
        calls = self._sweep.calls(size)
        if calls is None:
            return
        flops = self._flops(size, calls)
        timed = self._sweep.time(size, calls)
        if timed is None:
            return
        for key, contender in timed.items():
            peak = self._limits_of(key.mode)
            self._rows.append(row_of(size, key, contender, flops.get(key.module), peak.peak_flops if peak else None))
        self._parts += self._split(size, timed)
        for name in self._heads:
            self._add_points(size, name, calls, timed)

    def result(self, partial: str = "") -> InferenceTimingResult:
        """The result of the sizes so far."""
        sweep = self._sweep
        limits = self._limits.get(self._dtype)
        return InferenceTimingResult(
            rows=tuple(self._rows),
            environment=self._environment,
            warmup_runs=max((row.warmup_runs for row in self._rows), default=0),
            seed=sweep.seed,
            partial=partial,
            skipped=tuple(sweep.skipped),
            parts=tuple(self._parts),
            gaps=tuple(self._gap(*key, points) for key, points in self._points.items()),
            power=tuple(sweep.power.uses),
            uncounted=self._uncounted,
            peak_flops=limits.peak_flops if limits else None,
            launch_ms=limits.launch_ms if limits else None,
            bandwidths=dict(limits.bandwidths) if limits else {},
            load_average_end=load_average(),
        )

    def _limits_of(self, mode: TimingMode) -> Limits | None:
        dtype = torch.bfloat16 if mode == "bf16" else self._dtype
        if self._sweep.subject.device.type not in {"cpu", "cuda"}:
            return None
        return self._limits.setdefault(dtype, Limits(self._sweep.subject.device, dtype))

    def _flops(self, size: int, calls: Mapping[str, Call]) -> dict[str, int]:
        """Operations of each module: of a head by its own formula, else as counted once, in proportion to the size."""
        twins = {twin_name(name): twin for name, twin in self._sweep.subject.twins.items()}
        heads = {name: head for name, head in {**self._heads, **twins}.items() if name in calls}
        if not self._counted:
            found = {name: _counted(call) for name, call in calls.items() if call.is_whole}
            self._uncounted = found[MODEL].uncounted
            # a sparse head may run more experts than it chooses
            present = [(name, head) for name, head in self._heads.items() if name in calls]
            excess = sum(found[name].flops - active_flops(head, calls[name]) for name, head in present)
            self._counted = {
                name: (counted.flops - (excess if name == MODEL else 0), size) for name, counted in found.items()
            }
        known = {name: flops * size // first for name, (flops, first) in self._counted.items()}
        return known | {name: active_flops(head, calls[name]) for name, head in heads.items()}

    def _split(self, size: int, timed: Mapping[Key, Contender]) -> list[Part]:
        rounds = {key.module: c.wall_ms() for key, c in timed.items() if key == Key(key.module)}
        outer: dict[str, Rounds] = {name: rounds[name] for name in ("backbone", "head") if name in rounds}
        seed = self._sweep.seed
        parts = split(size, MODEL, rounds[MODEL], outer, "rest", seed) if outer and MODEL in rounds else []
        for head in self._heads:
            inner = {name: rounds[f"{head}.{name}"] for name in _STAGES if f"{head}.{name}" in rounds}
            if head in rounds and "router" in inner:
                parts += split(size, head, rounds[head], inner, "experts", seed)
        return parts

    def _add_points(self, size: int, name: str, calls: Mapping[str, Call], timed: Mapping[Key, Contender]) -> None:
        head, twin = self._heads[name], self._sweep.subject.twins.get(name)
        if twin is None:
            return
        for mode in self._sweep.plan.modes:
            keys = [Key(twin_name(name), mode, "warm"), Key(name, mode, "warm")]
            if not all(key in timed for key in keys):
                continue
            dense_call, call = calls[twin_name(name)], calls[name]
            limits = self._limits_of(mode) if mode == "eager" else None
            dense_bound = limits.bound(_counted(dense_call).operators) if limits else None
            head_bound = limits.bound(_counted(call).operators) if limits else None
            self._points[name, mode].append(
                GapPoint(
                    size,
                    mode,
                    active_flops(twin, dense_call) / active_flops(head, call),
                    *realised_ratio(timed[keys[0]].wall_ms(), timed[keys[1]].wall_ms(), self._sweep.seed),
                    bound=dense_bound.ms / head_bound.ms if dense_bound and head_bound else None,
                    dense_bound=dense_bound,
                    head_bound=head_bound,
                )
            )

    def _gap(self, name: str, mode: TimingMode, points: list[GapPoint]) -> Gap:
        sizes, ratios = [point.batch_size for point in points], [point.realised for point in points]
        return Gap(
            head=name,
            mode=mode,
            parameters=capacity(self._heads[name]).total,
            dense_parameters=capacity(self._sweep.subject.twins[name]).total,
            points=tuple(points),
            break_even=break_even(sizes, ratios),
        )


def _counted(call: Call) -> Counted:
    call.renew()
    return count(call)


def _dtype_of(model: nn.Module, device: torch.device) -> torch.dtype:
    """Data type of the caller's arithmetic."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
