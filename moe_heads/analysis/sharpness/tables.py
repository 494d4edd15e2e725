"""The tables in which curvature is read."""

import math
from collections.abc import Iterable, Mapping, Sequence

from moe_heads.analysis.sharpness.block import BlockCurvature

__all__ = ["blocks_table", "markdown_table"]

# A table of more experts than this is one that nobody reads.
_MOST_ROWS = 32


def blocks_table(kind: str, blocks: Mapping[str, BlockCurvature]) -> str:
    """Trace and shares of each block; "" where there are none, or too many to read."""
    if not 0 < len(blocks) <= _MOST_ROWS:
        return ""
    has_largest = any(block.lambda_max is not None for block in blocks.values())
    num_shares = max(len(block.shares) for block in blocks.values())
    heading = [kind, "parameters", "trace", *(["λmax"] if has_largest else [])]
    heading += [f"share of v{rank}" for rank in range(1, num_shares + 1)]
    rows = []
    for name, block in blocks.items():
        trace = "" if math.isnan(block.trace) else f"{block.trace:.4g} ± {block.trace_stderr:.1g}"
        largest = [] if not has_largest else ["" if block.lambda_max is None else f"{block.lambda_max:.4g}"]
        rows.append((name, f"{block.num_parameters}", trace, *largest, *(f"{share:.1%}" for share in block.shares)))
    return markdown_table(heading, rows)


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
