"""What a sweep has found so far: rows, splits and gaps, batch size by batch size."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from moe_heads.analysis._shared.environment import Environment, load_average
from moe_heads.analysis.inference_timing.arithmetic import flops_of
from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.counting import count
from moe_heads.analysis.inference_timing.gap import GapPoint, gap_of, realized_ratio
from moe_heads.analysis.inference_timing.heads import STAGES, part_name
from moe_heads.analysis.inference_timing.intervals import Rounds
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.roofline import Bound, Limits
from moe_heads.analysis.inference_timing.rounds import Contender
from moe_heads.analysis.inference_timing.row import Flops, Key, Skipped, TimingMode, TimingRow, row_of
from moe_heads.analysis.inference_timing.split import Part, split
from moe_heads.analysis.inference_timing.subject import Taken
from moe_heads.analysis.inference_timing.sweep import Sweep

__all__ = ["Findings"]


class Findings:
    """Adds batch sizes up to a result.

    Args:
        sweep: Runs them.
        environment: The environment before them.
    """

    def __init__(self, sweep: Sweep, environment: Environment) -> None:
        self._sweep, self._environment = sweep, environment
        self._subject, self._plan = sweep.subject, sweep.plan
        self._dtype = _dtype_of(self._subject.model, self._subject.device)
        self._limits: dict[torch.dtype, Limits] = {}
        self._uncounted: Mapping[str, int] = {}
        self._rows: list[TimingRow] = []
        self._parts: list[Part] = []
        self._points: dict[tuple[str, TimingMode], list[GapPoint]] = defaultdict(list)

    def add(self, size: int) -> None:
        """Time one batch size, or note why not."""
        taken = self._sweep.take(size)
        if taken is None:
            return
        flops = flops_of(self._subject, taken)
        timed = self._sweep.time(size, taken.calls)
        if MODEL in taken.captured.counted:
            self._uncounted = taken.captured.counted[MODEL].uncounted
        for key, contender in timed.items():
            peak = self._limits_of(key.mode)
            self._rows.append(row_of(size, key, contender, flops.get(key.module), peak.peak_flops if peak else None))
        self._parts += self._split(size, timed)
        for name in self._subject.twins:
            self._add_points(size, name, taken, flops, timed)

    def result(self, partial: str = "") -> InferenceTimingResult:
        """The result of the sizes so far."""
        sweep, subject = self._sweep, self._subject
        limits = self._limits.get(self._dtype)
        gaps = (
            gap_of(name, mode, self._plan.main_cache, (subject.heads[name], subject.twins[name]), points)
            for (name, mode), points in self._points.items()
        )
        return InferenceTimingResult(
            rows=tuple(self._rows),
            environment=self._environment,
            warmup_runs=max((row.warmup_runs for row in self._rows), default=0),
            seed=sweep.seed,
            partial=partial,
            skipped=(*sweep.skipped, *self._never()),
            parts=tuple(self._parts),
            gaps=tuple(gaps),
            power=tuple(sweep.power.uses),
            uncounted=self._uncounted,
            peak_flops=limits.peak_flops if limits else None,
            launch_ms=limits.launch_ms if limits else None,
            bandwidths=dict(limits.bandwidths) if limits else {},
            load_average_end=load_average(),
            plan=self._plan,
        )

    def _never(self) -> list[Skipped]:
        """What no batch size can have under this plan."""
        if "eager" in self._plan.modes:
            return []
        return [
            Skipped(None, None, None, "no split and no roofline: both are of the mode eager, which modes leaves out")
        ]

    def _limits_of(self, mode: TimingMode) -> Limits | None:
        dtype = torch.bfloat16 if mode == "bf16" else self._dtype
        if self._subject.device.type not in {"cpu", "cuda"}:
            return None
        return self._limits.setdefault(dtype, Limits(self._subject.device, dtype))

    def _split(self, size: int, timed: Mapping[Key, Contender]) -> list[Part]:
        rounds = {key.module: c.wall_ms() for key, c in timed.items() if key[1:] == ("eager", self._plan.main_cache)}
        outer: dict[str, Rounds] = {name: rounds[name] for name in ("backbone", "head") if name in rounds}
        seed = self._sweep.seed
        parts = split(size, MODEL, rounds[MODEL], outer, "rest", seed) if outer and MODEL in rounds else []
        for head in self._subject.heads:
            stages = {name: part_name(head, name) for name in STAGES}
            inner = {name: rounds[row] for name, row in stages.items() if row in rounds}
            if head in rounds and "router" in inner:
                parts += split(size, head, rounds[head], inner, "experts", seed)
        return parts

    def _add_points(
        self, size: int, name: str, taken: Taken, flops: Mapping[str, Flops], timed: Mapping[Key, Contender]
    ) -> None:
        twin = self._subject.twin_names[name]
        for mode in self._plan.modes:
            keys = [Key(row, mode, self._plan.main_cache) for row in (twin, name)]
            if not all(key in timed for key in keys):
                continue
            dense_bound, head_bound = self._bounds(name, taken) if mode == "eager" else (None, None)
            self._points[name, mode].append(
                GapPoint(
                    size,
                    mode,
                    flops[twin].value / flops[name].value,
                    *realized_ratio(timed[keys[0]].wall_ms(), timed[keys[1]].wall_ms(), self._sweep.seed),
                    bound=dense_bound.ms / head_bound.ms if dense_bound and head_bound else None,
                    dense_bound=dense_bound,
                    head_bound=head_bound,
                )
            )

    def _bounds(self, name: str, taken: Taken) -> tuple[Bound | None, Bound | None]:
        """Least times of the dense head and of the head; None for both where the operators of one are not known."""
        limits, call = self._limits_of("eager"), taken.calls[self._subject.twin_names[name]]
        call.renew()
        counted = [count(call), taken.captured.counted.get(name)]
        if limits is None or any(found is None or found.num_hidden for found in counted):
            return None, None
        dense, head = (limits.bound(found.operators) for found in counted if found is not None)
        return dense, head


def _dtype_of(model: nn.Module, device: torch.device) -> torch.dtype:
    """Data type of the caller's arithmetic."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
