"""Finished runs: which there are, and their mean and standard error over the seeds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from study.options import Options


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; its standard error is None for a single seed."""

    mean: float
    stderr: float | None

    def format(self, pattern: str = ".3g", scale: float = 1.0) -> str:
        """``mean ± standard error``."""
        mean = format(scale * self.mean, pattern)
        return mean if self.stderr is None else f"{mean} ± {format(scale * self.stderr, pattern)}"


def finished(options: Options) -> dict[tuple[str, int], dict[str, Any]]:
    """Results of the finished runs in the study's folder, for ``--resume``.

    Raises:
        ValueError: If there are runs without ``--resume``, or finished ones were made with other options.
    """
    found = {}
    for head in options.heads:
        for seed in range(options.seeds):
            path = options.run_dir(head, seed) / "result.json"
            if path.parent.exists() and not options.resume:
                raise ValueError(f"--out: {str(options.out)!r} holds runs already; pass --resume or another folder")
            if not path.exists():
                continue
            try:
                result = json.loads(path.read_text())
                made_with = result["config"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--resume: {path} is not the result of a run ({error}); remove its folder") from error
            config = json.loads(json.dumps(options.config()))
            differing = sorted(name for name in config if made_with.get(name) != config[name])
            if differing:
                told = ", ".join(f"{name}={made_with.get(name)!r}" for name in differing)
                raise ValueError(f"--resume: {path} was made with {told}; pass the same options or another --out")
            found[head, seed] = result
    return found


def estimate(results: Sequence[dict[str, Any]], metric: str) -> Estimate | None:
    """Mean of a metric over runs; None where no run has it."""
    values = [result["metrics"][metric] for result in results if metric in result["metrics"]]
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))
