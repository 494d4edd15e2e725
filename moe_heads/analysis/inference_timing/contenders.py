"""What takes turns at a batch size: every call in every mode and cache, warmed up."""

import time
from collections.abc import Callable, Mapping

import torch

from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.failures import first_line
from moe_heads.analysis.inference_timing.modes import ModeUnavailableError, in_mode
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.rounds import Contender, warm_up
from moe_heads.analysis.inference_timing.row import Key, Skipped, TimingMode
from moe_heads.routing import Router

__all__ = ["contenders_of", "warm_up_all"]


def contenders_of(
    size: int,
    calls: Mapping[str, Call],
    plan: TimingPlan,
    device: torch.device,
    *,
    forgive: Callable[[float], None],
    tick: Callable[[], None],
) -> tuple[dict[Key, Contender], list[Skipped]]:
    """Everything in every mode, and what there is not, with the reason; routers and stages in eager mode alone.

    Args:
        size: Samples of the batch.
        calls: What is timed, by the name of its rows.
        plan: Modes and caches.
        device: Where.
        forgive: Told the seconds that compilation and capture took.
        tick: Called between them.
    """
    found: dict[Key, Contender] = {}
    failed: list[Skipped] = []
    for mode in plan.modes:
        for name, call in calls.items():
            if mode != "eager" and (isinstance(call.module, Router) or not call.is_whole):
                continue
            start = time.perf_counter()
            try:
                run = _ready(mode, call, device)
            except Exception as error:
                # compiler, capture and kernels raise errors of many kinds; each is a finding about the mode
                if is_out_of_memory(error):
                    raise
                reason = str(error) if isinstance(error, ModeUnavailableError) else first_line(error)
                failed.append(Skipped(size, mode, name, reason))
                continue
            finally:
                forgive(time.perf_counter() - start)
            tick()
            renew = run.renew if isinstance(run, Call) else call.renew
            found |= {Key(name, mode, cache): Contender(run, cache, renew) for cache in plan.caches}
    return found, failed


def warm_up_all(contenders: Mapping[Key, Contender], clock: Clock, plan: TimingPlan, tick: Callable[[], None]) -> float:
    """Warm up all of them, in no more than half of the time of a size unless one run of each takes longer.

    Args:
        contenders: What takes turns.
        clock: The clock.
        plan: How long.
        tick: Called between them.

    Returns:
        Seconds that are left of the time of the size: half of it at least.
    """
    start = time.perf_counter()
    seconds = plan.seconds_per_size / (2 * max(len(contenders), 1))
    for contender in contenders.values():
        tick()
        warm_up(contender, clock, num_runs=plan.warmup_runs, tolerance=plan.warmup_tolerance, seconds=seconds)
        if clock.device.type == "cuda":
            contender.peak_memory = _peak_memory(contender, clock.device)
    return max(plan.seconds_per_size - (time.perf_counter() - start), plan.seconds_per_size / 2)


def _ready(mode: TimingMode, call: Call, device: torch.device) -> Callable[[], object]:
    call.renew()
    run = in_mode(mode, call, device)
    if mode != "eager":
        run()  # bf16 and channels_last fail in their first run, if they do
        call.renew()
    return run


def _peak_memory(contender: Contender, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
