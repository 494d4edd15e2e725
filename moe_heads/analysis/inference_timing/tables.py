"""The tables in which a timing is read."""

import math
from collections.abc import Iterable, Sequence

from moe_heads.analysis.inference_timing.gap import Gap, GapPoint
from moe_heads.analysis.inference_timing.row import Skipped, TimingRow
from moe_heads.analysis.inference_timing.split import Part

__all__ = ["gap_tables", "rows_table", "skipped_list", "split_tables"]


def rows_table(rows: Sequence[TimingRow]) -> str:
    """A line a row; columns that are empty throughout are left out."""
    heading = [
        "module",
        "batch",
        "mode",
        "p50 ms",
        "95 % interval of the sampling",
        "p90",
        "p99",
        "max",
        "runs",
        "samples/s",
    ]
    lines = [
        [
            row.module,
            f"{row.batch_size}",
            _how(row.mode, row.cache),
            f"{row.p50_ms:.4g}",
            _interval(row.p50_low_ms, row.p50_high_ms),
            f"{row.p90_ms:.4g}",
            f"{row.p99_ms:.4g}",
            f"{row.max_ms:.4g}",
            f"{row.num_runs}",
            f"{row.samples_per_s:,.0f}",
        ]
        for row in rows
    ]
    extras = {
        "device p50 ms": [_number(row.device_p50_ms) for row in rows],
        "MFLOP": [_flops(row) for row in rows],
        "of peak": ["" if row.peak_share is None else f"{row.peak_share:.1%}" for row in rows],
        "peak MiB": [_number(None if row.peak_memory is None else row.peak_memory / 2**20) for row in rows],
    }
    for name, column in extras.items():
        if any(column):
            heading.append(name)
            lines = [[*line, cell] for line, cell in zip(lines, column, strict=True)]
    return _table(heading, lines)


def gap_tables(gaps: Sequence[Gap]) -> list[str]:
    """Of each head, the ratios to the dense head of equal capacity, and where it breaks even."""
    found = []
    for gap in gaps:
        title = (
            f"**{gap.head} beside a dense head of equal capacity** ({_how(gap.mode, gap.cache)}; {gap.parameters:,} "
            f"and {gap.dense_parameters:,} parameters): {gap.verdict()}."
        )
        heading = ("batch", "theoretical", "realized", "95 % interval", "ratio of bounds", "bound by (dense, head)")
        found.append(f"{title}\n\n{_table(heading, [_gap_line(point) for point in gap.points])}")
    return found


def _gap_line(point: GapPoint) -> tuple[str, ...]:
    by = "" if not point.dense_bound or not point.head_bound else f"{point.dense_bound.by}, {point.head_bound.by}"
    return (
        f"{point.batch_size}",
        f"{point.theoretical:.3g}",
        f"{point.realized:.3g}",
        _interval(point.low, point.high),
        _number(point.bound, 3),
        by,
    )


def split_tables(parts: Sequence[Part]) -> list[str]:
    """Of the model and of each head, the milliseconds of its parts."""
    found = []
    for whole in dict.fromkeys(part.whole for part in parts):
        inside = [part for part in parts if part.whole == whole]
        names = {part.name: part.how for part in inside}
        heading = ("batch", *(name if how == "timed alone" else f"{name} ({how})" for name, how in names.items()))
        lines = []
        for size in dict.fromkeys(part.batch_size for part in inside):
            here = {part.name: part for part in inside if part.batch_size == size}
            cells = (_with_interval(here[name]) if name in here else "" for name in names)
            lines.append((f"{size}", *cells))
        found.append(f"**Parts of {whole}**, ms\n\n{_table(heading, lines)}")
    return found


def skipped_list(skipped: Sequence[Skipped]) -> str:
    """What was not timed, a line each; the same reason of several modules and batch sizes is said once."""
    found: dict[tuple[str, str], list[Skipped]] = {}
    for entry in skipped:
        found.setdefault((entry.mode or "", entry.reason), []).append(entry)
    lines = []
    for (mode, reason), entries in found.items():
        modules = dict.fromkeys(entry.module for entry in entries if entry.module)
        sizes = dict.fromkeys(f"{entry.batch_size}" for entry in entries if entry.batch_size)
        at = f"batch {', '.join(sizes)}" if sizes else ""
        lines.append(f"- {'; '.join(filter(None, (mode, ', '.join(modules), at)))}: {reason}")
    return "\n".join(["**Not timed**", "", *lines]) if lines else ""


def _how(mode: str, cache: str) -> str:
    return mode if cache == "warm" else f"{mode}, {cache}"


def _with_interval(part: Part) -> str:
    return f"{part.ms:.3g} ({_interval(part.low_ms, part.high_ms)})"


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "unknown"


def _flops(row: TimingRow) -> str:
    """Millions of operations; a lower bound is marked."""
    return "" if row.flops is None else f"{'' if row.flops_complete else '≥ '}{row.flops / 1e6:.4g}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines))
