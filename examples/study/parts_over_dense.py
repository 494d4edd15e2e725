"""Division of the time of a head in the runs of a study, in units of the time of the dense head."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from study.results import Run

__all__ = ["PartsOverDense", "parts_over_dense"]

# The batch of arXiv 2601.15021's timing.
_PREFIX, _SUFFIX = "inference_timing/test/head/batch256/", "_over_dense"
_LAUNCHES = "launches"


@dataclass(frozen=True)
class PartsOverDense:
    """Means over the runs of a head at a batch size of 256, divided by the time of the dense head.

    Attributes:
        parts: Time of each part of the head.
        launches: Time of the launches of its operators; None if unknown.
        theoretical: Operations of the head over those of the dense head; None if unknown.
    """

    parts: Mapping[str, float]
    launches: float | None
    theoretical: float | None


def parts_over_dense(runs: Sequence[Run], head: str) -> PartsOverDense | None:
    """Return the means over the runs of a head; None without parts."""
    found: dict[str, list[float]] = {}
    theoretical: list[float] = []
    for run in runs:
        if run["head"] != head:
            continue
        for name, value in run["metrics"].items():
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                found.setdefault(name.removeprefix(_PREFIX).removesuffix(_SUFFIX), []).append(value)
        speedup = run["metrics"].get(f"{_PREFIX}theoretical_speedup")
        theoretical += [1 / speedup] if speedup else []
    means = {part: statistics.fmean(values) for part, values in found.items()}
    launches = means.pop(_LAUNCHES, None)
    if not means:
        return None
    return PartsOverDense(means, launches, statistics.fmean(theoretical) if theoretical else None)
