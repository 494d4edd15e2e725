"""Series of the expert utilization during training: logged numbers, and statistics by epoch and by global step."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import Trainer

from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.callbacks._shared.reporting import Report, log_report
from moe_heads.callbacks._shared.trainer_access import process_group_of
from moe_heads.callbacks._utilization_log import UtilizationLog
from moe_heads.routing import RoutingStats

__all__ = ["MAX_WINDOWS", "end_window", "packed_history", "unpacked_history"]

MAX_WINDOWS = 256
"""Number of windows that are kept for a router, about as many as a figure can show."""

History = dict[str, dict[int, RoutingStats]]
"""Statistics by name of the head, and epoch or global step."""


def end_window(
    trainer: Trainer, log: UtilizationLog, routers: TrainingRouters, history: History, *, is_logged: bool
) -> None:
    """Report the window that ends at ``trainer.global_step``. Every rank must call it.

    Args:
        trainer: The trainer.
        log: Log of the fit.
        routers: The routers.
        history: Receives the statistics of the window.
        is_logged: False if a window that ended at the same step is already logged. The loggers have one point a step.
    """
    reports = routers.end_window(Ranks(process_group_of(trainer), f"{log.name}/step"))
    for head, report in reports.items():
        _add(history.setdefault(head, {}), trainer.global_step, report.stats)
    if reports and is_logged:
        # `pl_module.log_dict` would log only in every log_every_n_steps-th batch
        log_report(trainer, f"{log.name}/step", Report(log.window_numbers(reports, history)))


def packed_history(epochs: History, steps: History) -> dict[str, Any]:
    """Return the statistics as tensors and plain data for a checkpoint, nothing if there are none.

    The windows of a head are one tensor for each sum, because a checkpoint of many small tensors is slow.
    """
    if not epochs and not steps:
        return {}
    names = [f.name for f in fields(RoutingStats)]
    packed = {
        head: {"steps": list(own), **{n: torch.stack([getattr(stats, n) for stats in own.values()]) for n in names}}
        for head, own in steps.items()
    }
    return {"epochs": {h: {e: vars(s) for e, s in own.items()} for h, own in epochs.items()}, "steps": packed}


def unpacked_history(kept: Mapping[str, Any]) -> tuple[History, History]:
    """Return the statistics by epoch and by global step that `packed_history` packed."""
    if "epochs" not in kept:  # a checkpoint of before there were windows
        kept = {"epochs": kept, "steps": {}}
    epochs = {head: {e: RoutingStats(**stats) for e, stats in own.items()} for head, own in kept["epochs"].items()}
    return epochs, {head: dict(zip(own["steps"], _rows(own), strict=True)) for head, own in kept["steps"].items()}


def _rows(packed: Mapping[str, Any]) -> Iterator[RoutingStats]:
    columns = [packed[f.name].unbind() for f in fields(RoutingStats)]
    return (RoutingStats(*row) for row in zip(*columns, strict=True))


def _add(windows: dict[int, RoutingStats], step: int, stats: RoutingStats) -> None:
    """Add a window. From too many, neighbors are added under the later step: all steps stay, and sums stay exact."""
    windows[step] = windows[step] + stats if step in windows else stats
    if len(windows) <= MAX_WINDOWS:
        return
    # one is left out of an odd number: the latest, which has no later neighbor yet
    steps = sorted(windows)
    pairs = list(zip(steps[::2], steps[1::2], strict=False))
    merged = {late: windows[early] + windows[late] for early, late in pairs}
    latest = {step: windows[step] for step in steps[2 * len(pairs) :]}
    windows.clear()
    windows.update(merged | latest)
