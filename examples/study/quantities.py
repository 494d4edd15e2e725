"""What is compared between the heads: one number a run, computed from what the run stored."""

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
        value: From a run to the number; None where the run has none.
        pattern: Format of the number.
        is_ratio: Compared between heads by its logarithm: differences are factors.
        scale: Factor in tables and figures, 100 for percent.
        is_compared: Whether runs are held against each other: a time of one process against that of another says
            more about the machine than about the heads, and a speed is one against the dense head already.
        is_censored: Whether a run without the number has one that is too large to be seen: then a head of which any
            run lacks it is not compared, as the runs that have it are not like the others.
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
        """The number of a run; None where there is none, or none that is finite (and above 0, for a ratio)."""
        value = self.value(run)
        if value is None or not math.isfinite(value) or (self.is_ratio and value <= 0):
            return None
        return value


def metric(name: str) -> Value:
    """A number that was logged."""
    return lambda run: run["metrics"].get(name)


def _difference(first: str, second: str) -> Value:
    def value(run: Run) -> float | None:
        metrics = run["metrics"]
        return metrics[first] - metrics[second] if first in metrics and second in metrics else None

    return value


def shares_of_experts(run: Run) -> list[float]:
    """Use of every expert on test data in parts of its fair share 1/E; empty for a head without experts.

    The load of a head that chooses experts, the mixing weight of one that runs all.
    """
    found = run["loads"].get("test", {})
    shares = found.get("importance" if run["head"] == "soft" else "load", [])
    return [share * len(shares) for share in shares]


def _share_of_least_used(run: Run) -> float | None:
    return min(shares_of_experts(run), default=None)


def _beyond_quadratic(run: Run) -> float | None:
    """Largest rise of the loss on the line of the training split, by that of the parabola with the curvature λmax."""
    line = run["lines"].get("train")
    curvature = run["metrics"].get("sharpness/train/lambda_max")
    if line is None or not curvature:
        return None
    reach = max(map(abs, line["alphas"]))
    return max(_rises(line)) / (0.5 * curvature * reach**2)


def _largest_rise(run: Run) -> float | None:
    """Largest rise of the loss on the line of the training split, nats."""
    line = run["lines"].get("train")
    return None if line is None else max(_rises(line))


def _radius(run: Run) -> float | None:
    """Distance along the top eigenvector of the training split at which the loss has risen by 0.1 nats, either way."""
    line = run["lines"].get("train")
    if line is None:
        return None
    alphas, rises = line["alphas"], _rises(line)
    center = min(range(len(alphas)), key=lambda i: abs(alphas[i]))
    found = [_crossing(alphas, rises, range(center, end, step), 0.1) for end, step in ((len(alphas), 1), (-1, -1))]
    return min((distance for distance in found if distance is not None), default=None)


def _crossing(alphas: list[float], rises: list[float], path: range, level: float) -> float | None:
    """|α| at which the rise first reaches a level on the way, between grid points in a straight line."""
    for before, after in pairwise(path):
        if rises[after] >= level:
            share = 0.0 if math.isinf(rises[after]) else (level - rises[before]) / (rises[after] - rises[before])
            return abs(alphas[before] + share * (alphas[after] - alphas[before]))
    return None


def _rises(line: dict[str, list[Any]]) -> list[float]:
    # what JSON holds as null was infinite or nan
    losses = [math.inf if loss is None else loss for loss in line["losses"]]
    center = min(range(len(losses)), key=lambda i: abs(line["alphas"][i]))
    return [loss - losses[center] for loss in losses]


def _model_speedup(run: Run) -> float | None:
    """Time of the model with the dense head of equal capacity by that with its own.

    Model, head and dense head are timed in turns in one process; that of the model with the dense head is the model's
    without its head's, and with the dense head's.
    """
    prefix = "inference_timing/test"
    names = [f"{prefix}/{module}/batch{_BATCH}/p50_ms" for module in ("model", "head", "head_dense")]
    if not all(name in run["metrics"] for name in names):
        return None
    model, head, dense = (run["metrics"][name] for name in names)
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
RISE = Quantity("rise", "largest rise on the line (train), nats", _largest_rise, is_ratio=True)
SHAPE = Quantity("shape", "largest rise on the line by that of its parabola (train)", _beyond_quadratic, is_ratio=True)
BALANCE = Quantity("balance", "use of the least used expert, in fair shares", _share_of_least_used, ".2f")
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
    Quantity("experts", "experts in effect", metric("expert_utilization/test/head/effective_experts"), ".2f"),
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
"""What the generalization gap is held against."""
