"""Tables of the study in Markdown with aligned columns, which are readable in a terminal."""

from collections.abc import Sequence

from study.quantities import QUANTITIES, Quantity
from study.results import Run, heads_of
from study.rules import Verdict
from study.statistics import Comparison, Correlation, estimate, values_of


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with aligned columns."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main_table(runs: Sequence[Run]) -> str:
    """Format all quantities (rows) by head (columns): mean over the seeds, 95 % interval, and number of seeds."""
    sizes = {run["head"]: run["capacity"] for run in runs}
    heads = heads_of(runs)
    sized = [f"{sizes[head]['total']:,} ({sizes[head]['active']:,})" for head in heads]
    rows = [["parameters of the head (active)", *sized]]
    for quantity in QUANTITIES:
        cells = [_cell(runs, quantity, head) for head in heads]
        if any(cell != _NOTHING for cell in cells):
            rows.append([quantity.title, *cells])
    return markdown(["", *heads], rows)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Format the comparisons of heads: difference or factor, effect size, p-values."""
    rows = [
        [
            c.quantity.title,
            f"{c.head} {'/' if c.quantity.is_ratio else '−'} {c.baseline}",
            str(c.difference.num_seeds),
            c.difference.format(".3g" if c.quantity.is_ratio else "+.3g", c.quantity.scale),
            "–" if c.effect_size is None else f"{c.effect_size:+.2f}",
            "–" if c.p_value is None else f"{c.p_value:.2g}",
            "–" if c.adjusted_p_value is None else f"{c.adjusted_p_value:.2g}",
        ]
        for c in comparisons
    ]
    return markdown(["quantity", "heads", "n", "difference or factor [95 %]", "d_z", "p", "p, corrected"], rows)


def correlation_table(correlations: Sequence[Correlation]) -> str:
    """Format the correlations of sharpness measures with the generalization gap."""
    rows = [
        [
            c.quantity.title,
            f"{c.rho:+.2f}" + ("" if c.low is None else f" [{c.low:+.2f}, {c.high:+.2f}]"),
            f"{c.within_heads:+.2f}",
            str(c.num_runs),
        ]
        for c in correlations
    ]
    return markdown(["quantity, with the generalization gap", "Spearman's ρ [95 %]", "ρ within heads", "runs"], rows)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Format the verdicts on all claims."""
    return markdown(["", "claim", "verdict"], [[str(v.number), v.claim, f"**{v.outcome}**"] for v in verdicts])


def _cell(runs: Sequence[Run], quantity: Quantity, head: str) -> str:
    values = list(values_of(runs, quantity, head).values())
    found = estimate(values, quantity.is_ratio)
    num_runs = sum(run["head"] == head for run in runs)
    if quantity.is_censored and values and len(values) < num_runs:
        num_missing = num_runs - len(values)
        return f"≥ {min(values):{quantity.pattern}}; beyond the line in {num_missing} of {num_runs} runs"
    if found is None:
        return "beyond the line" if quantity.is_censored and num_runs else _NOTHING
    count = f" (n = {len(values)})" if len(values) < num_runs else ""
    return found.format(quantity.pattern, quantity.scale) + count


_NOTHING = "–"
