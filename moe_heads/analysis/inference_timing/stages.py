"""Heads with a router, their stages and row names, and the division of time between the parts of a whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from moe_heads.analysis.inference_timing.calls import MODEL, Call
from moe_heads.analysis.inference_timing.draws import DrawnRounds, bootstrap_draws, interval_of, median_of
from moe_heads.analysis.inference_timing.statistics import paired
from moe_heads.routed_module import RoutedModule
from moe_heads.routing import Router

__all__ = ["STAGES", "Part", "active_flops", "divided", "part_name", "routed_heads", "row_name", "stages_of"]

STAGES = ("router", "dispatch", "combine")
"""Stages of a head that are timed alone, in order. The experts take the remaining time of the head."""


@dataclass(frozen=True)
class Part:
    """Time of one part of a whole in eager mode.

    Attributes:
        batch_size: Samples of the batch.
        whole: "model", or the name of a head.
        name: "backbone", "head", "router", "dispatch", "experts", "combine", or "rest".
        ms: Median, milliseconds. A small difference of medians may be negative.
        low_ms: Lower end of its 95 % sampling interval.
        high_ms: Upper end.
        how: "timed alone" on the inputs of the part inside the whole, or "by difference" of the whole and the others.
    """

    batch_size: int
    whole: str
    name: str
    ms: float
    low_ms: float
    high_ms: float
    how: Literal["timed alone", "by difference"]


def divided(
    batch_size: int, whole: str, times: DrawnRounds, parts: Mapping[str, DrawnRounds], rest: str, seed: int
) -> list[Part]:
    """Divide the time of a whole into parts that were timed alone and the rest, over the rounds in which all ran."""
    per_draw = [paired(rounds) for rounds in zip(times, *parts.values(), strict=True)]
    times, *others = ([draw[place] for draw in per_draw] for place in range(1 + len(parts)))
    alone = [
        Part(batch_size, whole, name, median_of(part), *interval_of(part, seed), "timed alone")
        for name, part in zip(parts, others, strict=True)
    ]
    difference = bootstrap_draws(lambda whole, *others: whole - sum(others), [times, *others], seed)
    return [*alone, Part(batch_size, whole, rest, *difference, "by difference")]


def routed_heads(model: nn.Module) -> dict[str, RoutedModule]:
    """Return the heads and layers of this package that own a router, by row name; the model may be one itself."""
    return {
        row_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, RoutedModule) and any(isinstance(child, Router) for child in module.children())
    }


def row_name(name: str) -> str:
    """Return the row name of a module with a dotted name, which is "" for the whole model.

    Names that begin with "model" get another "model." in front, so that they differ from the row of the whole model.
    """
    return f"{MODEL}.{name}".removesuffix(".") if name.split(".")[0] in {"", MODEL} else name


def part_name(head: str, part: str) -> str:
    """Return the row name of a part of a head, which may be the whole model."""
    return part if head == MODEL else f"{head}.{part}"


def active_flops(head: RoutedModule, call: Call) -> int:
    """Return the theoretical operations of a call of a head, of the chosen experts only."""
    return sum(head.flops(x.shape[0], x.shape[1:-1].numel()).active for x in call.inputs)


def stages_of(head: RoutedModule, call: Call) -> dict[str, Call]:
    """Return the stages of a call of a head by name; see `RoutedModule.stages`."""
    stages: dict[str, list[Callable[[], object]]] = {}
    for x in call.inputs:
        for name, stage in head.stages(x).items():
            stages.setdefault(name, []).append(stage)
    return {name: Call(runs[0] if len(runs) == 1 else partial(_run_all, runs)) for name, runs in stages.items()}


def _run_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        function()
