"""Markdown tables of a utilization."""

from collections.abc import Mapping, Sequence

from moe_heads.analysis.expert_utilization.head import HeadUtilization

__all__ = ["experts_table", "quantities_table"]

_TOP_CLASSES = 3


def quantities_table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of a table with a row for each quantity and a column for each head.

    Args:
        columns: Quantities by name, by the name of the head.
    """
    names = list(columns)
    quantities = dict.fromkeys(quantity for values in columns.values() for quantity in values)
    rows = [[_cell(columns[name].get(quantity)) for name in names] for quantity in quantities]
    lines = [f"| {q.replace('_', ' ')} | {' | '.join(row)} |" for q, row in zip(quantities, rows, strict=True)]
    return [f"| quantity | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *lines]


def experts_table(head: HeadUtilization, class_names: Sequence[str]) -> str:
    """Table with a row for each expert: its load, weight, classes, and what the accuracy loses without it.

    Args:
        head: The head.
        class_names: Names of the classes.
    """
    columns = {"load": [f"{share:.1%}" for share in head.load], "importance": [f"{w:.1%}" for w in head.importance]}
    if head.class_counts is not None and head.specialization is not None:
        columns["specialization (nats)"] = [_cell(float(value)) for value in head.specialization]
        columns["most frequent classes"] = [_classes(counts, class_names) for counts in head.class_counts.t().tolist()]
    if head.ablation is not None:
        lost = zip(head.ablation.contribution.tolist(), head.ablation.without_stderr.tolist(), strict=True)
        columns["accuracy lost without it"] = [f"{value:+.2%} ± {stderr:.2%}" for value, stderr in lost]
    state = {**dict.fromkeys(head.starved_experts, " (starved)"), **dict.fromkeys(head.dead_experts, " (dead)")}
    rows = [
        f"| {expert}{state.get(expert, '')} | {' | '.join(column[expert] for column in columns.values())} |"
        for expert in range(len(head.load))
    ]
    notes = []
    if head.ablation is not None:
        notes.append(f"\nAccuracy with all experts: {head.ablation.accuracy:.2%}; ± one standard error, paired.")
    return "\n".join([f"| expert | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows, *notes])


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _classes(counts: Sequence[int], class_names: Sequence[str]) -> str:
    """The classes of one expert that it sees most, with their share of its rows."""
    total = sum(counts)
    first = sorted(range(len(counts)), key=lambda c: -counts[c])[:_TOP_CLASSES]
    if not total:
        return "–"
    names = {c: " ".join(class_names[c].split()).replace("|", "/") for c in first}
    return ", ".join(f"{names[c]} {counts[c] / total:.0%}" for c in first if counts[c])
