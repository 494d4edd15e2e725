"""Markdown tables of an inference timing."""

import math
from collections.abc import Iterable, Sequence

from moe_heads.analysis.inference_timing.draws import DrawSpread
from moe_heads.analysis.inference_timing.gap_shares import GapShares
from moe_heads.analysis.inference_timing.requests import RequestReport
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow
from moe_heads.analysis.inference_timing.speedup import Gap, GapPoint
from moe_heads.analysis.inference_timing.stages import Part

__all__ = ["gap_table", "part_tables", "request_table", "rows_table", "skipped_list"]


def rows_table(rows: Sequence[TimingRow]) -> str:
    """Return one line per row, without the columns that are empty throughout."""
    columns = {
        "module": [row.module for row in rows],
        "batch": [f"{row.batch_size}" for row in rows],
        "mode": [row.mode for row in rows],
        "p50 ms": [_number(row.p50_ms) for row in rows],
        "95 % sampling interval": [_interval(row.p50_low_ms, row.p50_high_ms) for row in rows],
        "p90": [_number(row.p90_ms) for row in rows],
        "p99": [_number(row.p99_ms) for row in rows],
        "max": [_number(row.max_ms) for row in rows],
        "runs": [f"{row.num_runs}" for row in rows],
        "samples/s": [f"{row.samples_per_s:,.0f}" for row in rows],
    }
    spreads = [row.spread for row in rows]
    optional = {
        "between draws": ["" if spread is None else _spread(spread) for spread in spreads],
        "noise of a draw": ["" if spread is None else f"± {spread.within_ms:.2g}" for spread in spreads],
        "device p50 ms": [_number(row.device_p50_ms) for row in rows],
        "MFLOP": [_flops(row) for row in rows],
        "of peak": ["" if row.peak_share is None else f"{row.peak_share:.1%}" for row in rows],
        "peak MiB": [_number(None if row.peak_memory is None else row.peak_memory / 2**20) for row in rows],
    }
    columns |= {name: column for name, column in optional.items() if any(column)}
    return _table(list(columns), zip(*columns.values(), strict=True))


def gap_table(gap: Gap, shares: Sequence[GapShares]) -> str:
    """Return the speed ratios of a head to the dense head of equal capacity, its break-even, and its largest parts."""
    title = (
        f"**{gap.head} compared with a dense head of equal capacity** ({gap.mode}; {gap.parameters:,} and "
        f"{gap.dense_parameters:,} parameters): {gap.verdict()}."
    )
    heading = ("batch", "theoretical", "realized", "95 % interval", "ratio of bounds", "bound by (dense, head)")
    table = f"{title}\n\n{_table(heading, map(_gap_line, gap.points))}"
    return f"{table}\n\n{shares[-1]}." if shares else table


def _gap_line(point: GapPoint) -> tuple[str, ...]:
    by = f"{point.dense_bound.by}, {point.head_bound.by}" if point.dense_bound and point.head_bound else ""
    ratios = _number(point.theoretical, 3), _number(point.realized, 3), _interval(point.low, point.high)
    return f"{point.batch_size}", *ratios, _number(point.bound, 3), by


def part_tables(parts: Sequence[Part]) -> list[str]:
    """Return one table for the model and for each head, with the milliseconds of the parts."""
    tables = []
    for whole in dict.fromkeys(part.whole for part in parts):
        inside = [part for part in parts if part.whole == whole]
        names = {part.name: part.how for part in inside}
        heading = ("batch", *(name if how == "timed alone" else f"{name} ({how})" for name, how in names.items()))
        lines = []
        for size in dict.fromkeys(part.batch_size for part in inside):
            here = {part.name: part for part in inside if part.batch_size == size}
            lines.append((f"{size}", *(_part_cell(here[name]) if name in here else "" for name in names)))
        tables.append(f"**Parts of {whole}**, ms\n\n{_table(heading, lines)}")
    return tables


def _part_cell(part: Part) -> str:
    return f"{part.ms:.3g} ({_interval(part.low_ms, part.high_ms)})"


def skipped_list(skipped: Sequence[Skipped]) -> str:
    """Return one line per mode and reason, with all modules and batch sizes that share it."""
    groups: dict[tuple[str, str], list[Skipped]] = {}
    for entry in skipped:
        groups.setdefault((entry.mode or "", entry.reason), []).append(entry)
    lines = []
    for (mode, reason), entries in groups.items():
        modules = dict.fromkeys(entry.module for entry in entries if entry.module)
        sizes = dict.fromkeys(f"{entry.batch_size}" for entry in entries if entry.batch_size)
        at = f"batch {', '.join(sizes)}" if sizes else ""
        what = "; ".join(filter(None, (mode, ", ".join(modules), at)))
        lines.append(f"- {what}: {reason}" if what else f"- {reason}")
    return "\n".join(["**Not timed**", "", *lines]) if lines else ""


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "unknown"


def _flops(row: TimingRow) -> str:
    """Return the millions of operations; "≥" marks a lower bound."""
    return "" if row.flops is None else f"{'' if row.flops_complete else '≥ '}{row.flops / 1e6:.4g}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines))


def _spread(spread: DrawSpread) -> str:
    """Return the standard deviation between draws, or that it is not larger than the noise."""
    text = f"± {spread.between_ms:.2g}"
    return text if spread.is_significant else f"{text}, not significant"


def request_table(report: RequestReport) -> str:
    """Return the entries of a request, and the shapes of the draws of each batch size."""
    title = f"**Requests**: {report.entries}. Batches: {report.origin}. Draws of each size: {report.why_draws}."
    lines = [
        (f"{size}", f"{len(draws)}", "; ".join(dict.fromkeys(filter(None, draws))) or "no tensor")
        for size, draws in report.shapes.items()
    ]
    return f"{title}\n\n{_table(('batch', 'draws', 'shapes'), lines)}" if lines else title
