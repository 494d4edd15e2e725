"""Curvature of the loss along some of the parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.sharpness.hessian.basis import dot

__all__ = ["BlockCurvature", "block_shares", "blocks_table"]

# A longer table of experts is left out of the summary.
_MOST_ROWS = 32


@dataclass(frozen=True)
class BlockCurvature:
    r"""Curvature of the loss along some of the parameters, the diagonal block :math:`H_{bb}`.

    Attributes:
        num_parameters: Order of the block.
        shares: Share (0 to 1) of the squared norm of each eigenvector of H that lies in the block.
        trace: Trace of the block; nan where it was not computed.
        trace_stderr: Its standard error.
        lambda_max: Largest eigenvalue of the block; None where it was not requested. That of H is at least as large.
        lambda_max_residual: Its relative residual; infinite where a larger eigenvalue may be missing.
    """

    num_parameters: int
    shares: tuple[float, ...]
    trace: float
    trace_stderr: float
    lambda_max: float | None = None
    lambda_max_residual: float | None = None


def block_shares(vectors: Tensor, places: Sequence[slice]) -> tuple[float, ...]:
    """Return the share (0 to 1) of the squared norm of each unit vector, a row of (k, P), that lies in some places."""
    squares = (sum(dot(vector[place], vector[place]) for place in places) for vector in vectors)
    return tuple(min(max(square, 0.0), 1.0) for square in squares)


def blocks_table(kind: str, blocks: Mapping[str, BlockCurvature]) -> str:
    """Return a Markdown table with the trace and the shares of each block; "" for none or more than 32."""
    if not 0 < len(blocks) <= _MOST_ROWS:
        return ""
    has_largest = any(block.lambda_max is not None for block in blocks.values())
    num_shares = max(len(block.shares) for block in blocks.values())
    has_trace = any(math.isfinite(block.trace) for block in blocks.values())
    heading = [kind, "parameters", *(["trace"] if has_trace else []), *(["λmax"] if has_largest else [])]
    heading += [f"share of v{rank}" for rank in range(1, num_shares + 1)]
    rows = []
    for name, block in blocks.items():
        trace = [] if not has_trace else ["" if math.isnan(block.trace) else _with_error(block)]
        largest = [] if not has_largest else ["" if block.lambda_max is None else f"{block.lambda_max:.4g}"]
        rows.append((name, f"{block.num_parameters}", *trace, *largest, *(f"{share:.1%}" for share in block.shares)))
    return markdown_table(heading, rows)


def _with_error(block: BlockCurvature) -> str:
    return f"{block.trace:.4g} ± {block.trace_stderr:.1g}"
