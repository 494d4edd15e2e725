"""Quantities that are compared between heads: one number for each run, computed from its stored results."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from study.results import Run

Value = Callable[[Run], float | None]

# The batch of arXiv 2601.15021's timing.
_BATCH = 256


@dataclass(frozen=True)
class Quantity:
    """A number of a run.

    Attributes:
        key: Short name.
        title: Name in tables and figures, with its unit.
        value: Computes the number of a run, or None if the run lacks it.
        pattern: Format of the number.
        is_ratio: Whether heads are compared by the logarithm, so that differences are factors.
        scale: Factor in tables and figures, 100 for percent.
        is_compared: Whether heads are compared. Times of different processes depend more on the machine than on the
            heads, and a speed is already relative to the dense head.
        is_censored: Whether a missing number is too large to be measured. Then a head with a missing number is not
            compared, since the runs with a number are a biased selection.
    """

    key: str
    title: str
    value: Value
    pattern: str = ".3g"
    is_ratio: bool = False
    scale: float = 1.0
    is_compared: bool = True
    is_censored: bool = False

    def of(self, run: Run) -> float | None:
        """Return the number of a run, or None unless it is finite (and above 0, for a ratio)."""
        value = self.value(run)
        if value is None or not math.isfinite(value) or (self.is_ratio and value <= 0):
            return None
        return value


def metric(name: str) -> Value:
    """Return a function that reads a logged number."""
    return lambda run: run["metrics"].get(name)


def _difference(first: str, second: str) -> Value:
    def value(run: Run) -> float | None:
        metrics = run["metrics"]
        return metrics[first] - metrics[second] if first in metrics and second in metrics else None

    return value


def shares_of_experts(run: Run) -> list[float]:
    """Return the load of every expert on test data relative to 1/E; empty for a head without experts.

    For a soft head, which runs all experts, the mixing weight takes the place of the load.
    """
    found = run["loads"].get("test", {})
    shares = found.get("importance" if run["head"] == "soft" else "load", [])
    return [share * len(shares) for share in shares]


def _share_of_least_used(run: Run) -> float | None:
    return min(shares_of_experts(run), default=None)


def _beyond_quadratic(run: Run) -> float | None:
    """Return the largest loss increase on the training line, relative to the parabola with the curvature λmax."""
    line = run["lines"].get("train")
    curvature: float | None = run["metrics"].get("sharpness/train/lambda_max")
    if line is None or not curvature:
        return None
    reach: float = max(map(abs, line["alphas"]))
    return max(_rises(line)) / (0.5 * curvature * reach**2)


def _largest_rise(run: Run) -> float | None:
    """Return the largest loss increase on the line of the training split, in nats."""
    line = run["lines"].get("train")
    return None if line is None else max(_rises(line))


def _radius(run: Run) -> float | None:
    """Return the smallest distance along the training split's top eigenvector with a loss increase of 0.1 nats."""
    line = run["lines"].get("train")
    if line is None:
        return None
    alphas, rises = line["alphas"], _rises(line)
    center = min(range(len(alphas)), key=lambda i: abs(alphas[i]))
    found = [_crossing(alphas, rises, range(center, end, step), 0.1) for end, step in ((len(alphas), 1), (-1, -1))]
    return min((distance for distance in found if distance is not None), default=None)


def _crossing(alphas: list[float], rises: list[float], path: range, level: float) -> float | None:
    """Return |α| at which the increase first reaches a level on a path, by linear interpolation."""
    for before, after in pairwise(path):
        if rises[after] >= level:
            share = 0.0 if math.isinf(rises[after]) else (level - rises[before]) / (rises[after] - rises[before])
            return abs(alphas[before] + share * (alphas[after] - alphas[before]))
    return None


def _rises(line: dict[str, list[Any]]) -> list[float]:
    # null in JSON was infinite or nan
    losses = [math.inf if loss is None else loss for loss in line["losses"]]
    center = min(range(len(losses)), key=lambda i: abs(line["alphas"][i]))
    return [loss - losses[center] for loss in losses]


def _model_speedup(run: Run) -> float | None:
    """Return the time of the model with the dense head of equal capacity, divided by that with its own head.

    Model, head and dense head are timed in turns in one process. The time of the model with the dense head is the
    model's time minus its head's time plus the dense head's time.
    """
    prefix = "inference_timing/test"
    names = [f"{prefix}/{module}/batch{_BATCH}/p50_ms" for module in ("model", "head", "head_dense")]
    if not all(name in run["metrics"] for name in names):
        return None
    times: list[float] = [run["metrics"][name] for name in names]
    model, head, dense = times
    return (model - head + dense) / model


ACCURACY = Quantity("accuracy", "test accuracy, %", metric("plain/test/accuracy"), ".2f", scale=100)
VAL_ACCURACY = Quantity("val_accuracy", "validation accuracy, %", metric("plain/val/accuracy"), ".2f", scale=100)
GAP = Quantity(
    "gap", "generalization gap (test − train loss), nats", _difference("plain/test/loss", "plain/train/loss")
)
LAMBDA_TRAIN = Quantity("lambda_train", "λmax train", metric("sharpness/train/lambda_max"), is_ratio=True)
TRACE_TRAIN = Quantity("trace_train", "trace train", metric("sharpness/train/trace"), is_ratio=True)
LAMBDA_TEST = Quantity("lambda_test", "λmax test", metric("sharpness/test/lambda_max"), is_ratio=True)
TRACE_TEST = Quantity("trace_test", "trace test", metric("sharpness/test/trace"), is_ratio=True)
RADIUS = Quantity("radius", "radius (train), α at +0.1 nats", _radius, is_ratio=True, is_censored=True)
RISE = Quantity("rise", "largest loss increase on the line (train), nats", _largest_rise, is_ratio=True)
SHAPE = Quantity(
    "shape", "largest loss increase on the line, relative to its parabola (train)", _beyond_quadratic, is_ratio=True
)
BALANCE = Quantity("balance", "load of the least-used expert × E", _share_of_least_used, ".2f")
SPEEDUP = Quantity(
    "speedup", "speed of the model, dense = 1 (B = 256)", _model_speedup, ".4f", is_ratio=True, is_compared=False
)
HEAD_SPEEDUP = Quantity(
    "head_speedup",
    "speed of the head, dense = 1 (B = 256)",
    metric(f"inference_timing/test/head/batch{_BATCH}/speedup"),
    is_ratio=True,
)

QUANTITIES = (
    ACCURACY,
    VAL_ACCURACY,
    Quantity("calibration", "calibration error, %", metric("test/calibration_error"), ".2f", scale=100),
    GAP,
    LAMBDA_TRAIN,
    LAMBDA_TEST,
    TRACE_TRAIN,
    TRACE_TEST,
    RADIUS,
    RISE,
    SHAPE,
    Quantity("experts", "effective experts", metric("expert_utilization/test/head/effective_experts"), ".2f"),
    BALANCE,
    Quantity(
        "head_ms",
        "head, ms (B = 256)",
        metric(f"inference_timing/test/head/batch{_BATCH}/p50_ms"),
        is_ratio=True,
        is_compared=False,
    ),
    Quantity(
        "model_ms",
        "model, ms (B = 256)",
        metric(f"inference_timing/test/model/batch{_BATCH}/p50_ms"),
        is_ratio=True,
        is_compared=False,
    ),
    HEAD_SPEEDUP,
    SPEEDUP,
)
"""Rows of the report's table."""

SHARPNESS = (LAMBDA_TRAIN, LAMBDA_TEST, TRACE_TRAIN, TRACE_TEST, RADIUS, RISE, SHAPE)
"""Quantities that are correlated with the generalization gap."""
