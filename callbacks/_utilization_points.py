"""Statistics of the expert utilization during training, by epoch and by global step."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from moe_heads.routing import RoutingStats

__all__ = ["MAX_WINDOWS", "History", "add_window", "packed_history", "unpacked_history"]

MAX_WINDOWS = 256
"""Number of windows that are kept for a router, about as many as a figure can show."""

History = dict[str, dict[int, RoutingStats]]
"""Statistics by name of the head, and epoch or global step."""


def add_window(windows: dict[int, RoutingStats], step: int, stats: RoutingStats) -> None:
    """Add a window that ends at a step.

    From too many, neighbors are added under the later step: all steps stay, and sums stay exact.
    """
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
