"""Errors of the metrics of a result, and the rule by which two metrics differ."""

import math
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from moe_heads.analysis import InferenceTimingResult, SharpnessResult

__all__ = ["RULE", "differ", "errors_of"]

RULE = (
    "Two numbers differ if |a − b| > 2 √(e_a² + e_b²). The error e of a number joins its numerical error (the residual"
    " of an eigenvalue, the standard error of the trace, half of the 95 % interval of a time with its allowance for"
    " drift) and the standard error from the choice of samples, where it is known. Numbers without an error are not"
    " compared."
)
"""The rule, for the page."""


def differ(first: float, second: float, first_error: float | None, second_error: float | None) -> bool | None:
    """Return whether two numbers differ by more than their errors, None if an error is unknown."""
    if first_error is None or second_error is None or not math.isfinite(first_error + second_error):
        return None
    return abs(first - second) > 2 * math.hypot(first_error, second_error)


@singledispatch
def errors_of(result: Any) -> Mapping[str, float]:
    """Return the errors of the metrics of a result by name; empty for a type of results without errors."""
    return {}


@errors_of.register(SharpnessResult)
def _(result: SharpnessResult) -> Mapping[str, float]:
    names = ["lambda_max", *(f"lambda_{rank}" for rank in range(2, len(result.eigenvalues) + 1))]
    errors = {
        name: residual * abs(value)
        for name, residual, value in zip(names, result.residuals, result.eigenvalues, strict=True)
    }
    errors["lambda_max"] = _joined(errors["lambda_max"], result.lambda_max_sampling_stderr)
    errors["trace"] = _joined(result.trace_stderr, result.trace_sampling_stderr)
    metrics = result.metrics()
    if "lambda_min" in metrics:  # else it is an upper bound alone
        errors["lambda_min"] = result.lambda_min_residual * abs(result.lambda_min)
    errors |= {
        name.replace("trace_stderr_", "trace_"): error
        for name, error in metrics.items()
        if name.startswith("trace_stderr_")
    }
    return _finite(errors)


@errors_of.register(InferenceTimingResult)
def _(result: InferenceTimingResult) -> Mapping[str, float]:
    return _finite({
        f"{row.key}/p50_ms": _joined((row.p50_high_ms - row.p50_low_ms) / 4, result.drift_allowance * row.p50_ms / 2)
        for row in result.rows
    })


def _joined(error: float, other: float) -> float:
    return math.hypot(error, other) if math.isfinite(other) else error


def _finite(errors: Mapping[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if math.isfinite(error)}
