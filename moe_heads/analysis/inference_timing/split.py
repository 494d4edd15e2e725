"""Where the time of a model and of its heads goes: parts that are timed alone, and what they leave of the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_heads.analysis.inference_timing.intervals import (
    Rounds,
    bootstrap_interval,
    containing,
    median_interval,
    paired,
)

__all__ = ["How", "Part", "split"]

How = Literal["timed alone", "by difference"]


@dataclass(frozen=True)
class Part:
    """Time of one part of a whole, in eager mode.

    Attributes:
        batch_size: Samples of the batch.
        whole: "model", or the name of a head.
        name: "backbone", "head", "router", "dispatch", "experts", "combine", or "rest".
        ms: Median, milliseconds; a difference of medians may come out below zero when it is small.
        low_ms: Lower end of its 95 % interval of the sampling.
        high_ms: Upper end.
        how: "timed alone", on the inputs that the part has inside; or "by difference", the whole less the others.
    """

    batch_size: int
    whole: str
    name: str
    ms: float
    low_ms: float
    high_ms: float
    how: How


def split(batch_size: int, whole: str, times: Rounds, parts: Mapping[str, Rounds], rest: str, seed: int) -> list[Part]:
    """The parts of a whole, the last of them by difference, of the rounds that all of them took part in.

    Args:
        batch_size: Samples of the batch.
        whole: Name of the whole.
        times: Times of the whole.
        parts: Times of the parts that were timed alone.
        rest: Name of what is left.
        seed: Seed of the bootstrap.
    """
    times, *others = paired([times, *parts.values()])
    found = []
    for name, rounds in zip(parts, others, strict=True):
        ends = median_interval(rounds)
        found.append(Part(batch_size, whole, name, _median(rounds), *ends, "timed alone"))
    left = _median(times) - sum(part.ms for part in found)
    ends = bootstrap_interval(lambda whole, *others: whole - sum(others), [times, *others], seed)
    return [*found, Part(batch_size, whole, rest, left, *containing(left, ends), "by difference")]


def _median(rounds: Rounds) -> float:
    return float(np.median([time for found in rounds for time in found]))
