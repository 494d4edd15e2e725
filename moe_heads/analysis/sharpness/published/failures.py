"""What goes wrong in PyHessian's numbers, a sentence each."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

__all__ = ["RESIDUAL_LIMIT", "TRACE_LIMIT", "eigenvalue_failures", "trace_failures"]

# PyHessian's own defaults, for messages: it is called without them.
RESIDUAL_LIMIT = 1e-3
_MAX_PROBES = 100

# Standard error, as a fraction of the trace, from which on it is said to be inaccurate.
TRACE_LIMIT = 0.05


def eigenvalue_failures(values: Sequence[float], residuals: Sequence[float]) -> Iterator[str]:
    """Eigenvalues out of order, negative ones, and those with a large residual.

    Yields:
        A sentence for each kind, of a wrong order for each pair.
    """
    for rank, (value, following) in enumerate(pairwise(values), start=1):
        if abs(value) < abs(following):
            bars = "" if min(value, following) >= 0 else "|"
            yield (
                f"order: {bars}λ{rank}{bars} < {bars}λ{rank + 1}{bars} ({value:.4g} and {following:.4g}): the power"
                f" iteration for λ{rank} stopped before it converged"
            )
    negative = [f"λ{rank} = {value:.4g}" for rank, value in enumerate(values, start=1) if value < 0]
    if negative:
        yield (
            f"sign: {', '.join(negative)}: power iteration finds the eigenvalues that are largest in absolute value,"
            " so larger ones, which are positive, may be missing"
        )
    rough = [f"λ{rank} {size:.1e}" for rank, size in enumerate(residuals, start=1) if size > RESIDUAL_LIMIT]
    if rough:
        yield (
            f"residual: ‖Hv − λv‖/|λ| is above {RESIDUAL_LIMIT:g} ({', '.join(rough)}): the power iteration stops when"
            " the value changes little, not when the vector has converged"
        )


def trace_failures(samples: Sequence[float], trace: float, stderr: float) -> Iterator[str]:
    """A trace that was given up at a negative mean, and one that is inaccurate.

    Yields:
        A sentence for each.
    """
    if len(samples) > 1 and sum(samples[:-1]) / (len(samples) - 1) + 1e-6 < 0:
        yield (
            f"trace: PyHessian stopped after {len(samples)} samples because its mean was negative: its stopping rule"
            " divides by the trace without its absolute value"
        )
    if stderr > TRACE_LIMIT * abs(trace):
        why = "it takes no more" if len(samples) == _MAX_PROBES else "the mean changed little, accurate or not"
        yield (
            f"trace: {trace:.4g} has a standard error of {stderr:.2g} at sample {len(samples)}, where PyHessian"
            f" stopped: {why}"
        )
