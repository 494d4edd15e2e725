"""Tables of the expert utilization in Markdown: of a few heads, of one head by expert, and of many layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.health import MIN_FAIR_SHARE
from moe_heads.analysis.expert_utilization.layers import Layer, level_of, worst_first

__all__ = ["experts_table", "heads_table", "layers_table"]

# Largest number of classes of an expert, of layers, and of experts that a line names.
_TOP_CLASSES, _MAX_LAYERS, _MAX_EXPERTS = 3, 5, 16

# Measures in the tables of layers, with the names of both ends of their range.
_MEASURES = {
    "load_cv": ("worst", "best"),
    "max_violation": ("worst", "best"),
    "relative_effective_experts": ("worst", "best"),
    "dropped": ("worst", "best"),
    "relative_entropy": ("lowest", "highest"),
}


def heads_table(heads: Mapping[str, HeadUtilization]) -> str:
    """Write a table with a row per quantity and a column per head, and a line about the underused experts of each."""
    columns = {name: head.quantities() for name, head in heads.items()}
    quantities = dict.fromkeys(quantity for values in columns.values() for quantity in values)
    rows = [[_spaced(q), *(_cell(values.get(q)) for values in columns.values())] for q in quantities]
    underused = [line for name, head in heads.items() for line in _underused(name, head)]
    return "\n".join([markdown_table(["quantity", *columns], rows), *underused])


def experts_table(head: HeadUtilization, class_names: Sequence[str]) -> str:
    """Write a table with a row per expert: load, importance, classes, and the accuracy lost without it.

    Args:
        head: The head.
        class_names: Names of the classes.
    """
    columns = {"load": [f"{share:.1%}" for share in head.load], "importance": [f"{w:.1%}" for w in head.importance]}
    if head.class_counts is not None and head.specialization is not None:
        columns["specialization (nats)"] = ["–" if v.isnan() else _cell(float(v)) for v in head.specialization]
        columns["most frequent classes"] = [_classes(counts, class_names) for counts in head.class_counts.t().tolist()]
    if head.ablation is not None:
        lost = zip(head.ablation.contribution.tolist(), head.ablation.without_stderr.tolist(), strict=True)
        columns["accuracy lost without it"] = [f"{value:+.2%} ± {stderr:.2%}" for value, stderr in lost]
    state = {**dict.fromkeys(head.starved_experts, " (starved)"), **dict.fromkeys(head.dead_experts, " (dead)")}
    rows = [
        [f"{expert}{state.get(expert, '')}", *(column[expert] for column in columns.values())]
        for expert in range(len(head.load))
    ]
    notes = []
    if head.ablation is not None:
        notes.append(f"\nAccuracy with all experts: {head.ablation.accuracy:.2%}. ± is one paired standard error.")
    return "\n".join([markdown_table(["expert", *columns], rows), *notes])


def layers_table(heads: Mapping[str, HeadUtilization]) -> str:
    """Write which of many layers have the worst balance: a table of the measures, and one of the worst layers.

    Its size does not depend on the number of layers.
    """
    layers = {name: Layer.of_head(head) for name, head in heads.items()}
    sizes = sorted({layer.num_experts for layer in layers.values()})
    experts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    counts = [
        f"{state}: {sum(numbers)} experts in {sum(map(bool, numbers))} layers."
        for state, numbers in (
            ("Dead", [len(layer.dead) for layer in layers.values()]),
            ("Starved", [len(layer.starved) for layer in layers.values()]),
        )
    ]
    measures = {name: layer.measures for name, layer in layers.items()}
    worst = worst_first(layers)[:_MAX_LAYERS]
    rows = [
        [
            _escape(name),
            str(len(layers[name].dead)),
            str(len(layers[name].starved)),
            *(_cell(measures[name].get(measure, math.nan)) for measure in _MEASURES),
        ]
        for name in worst
    ]
    return "\n".join([
        f"{len(layers)} layers with {experts} experts each. {' '.join(counts)}\n",
        markdown_table(
            ["measure", "worst", "in layer", "median", "best", "in layer"],
            [_row_of_measure(measure, measures) for measure in _MEASURES],
        ),
        "\nThe layers with the largest fraction of dead experts, then with the fewest effective experts:\n",
        markdown_table(["layer", "dead", "starved", *map(_spaced, _MEASURES)], rows),
        *(line for name in worst for line in _underused(name, heads[name])),
    ])


def _row_of_measure(measure: str, measures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a measure, both ends of its range with the layer of each, and its median between them."""
    ends = _MEASURES[measure]
    title = _spaced(measure) if "worst" in ends else f"{_spaced(measure)} ({', median, '.join(ends)})"
    values = {name: found.get(measure, math.nan) for name, found in measures.items()}
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if not known:
        return [title, "unknown", "–", "unknown", "unknown", "–"]
    cells = []
    for end in ends:
        found = level_of(measure, list(known.values()), end)
        cells.append([_cell(found), _escape(next(name for name, value in known.items() if value == found))])
    return [title, *cells[0], _cell(median(known.values())), *cells[1]]


def _underused(name: str, head: HeadUtilization) -> Iterator[str]:
    """Yield a line about the dead and one about the starved experts of a head."""
    for state, experts in (("dead", head.dead_experts), ("starved", head.starved_experts)):
        if experts:
            of_all = f"{len(experts)} of {len(head.load)} experts"
            yield f"\n{state.title()} in {name}: {of_all}, number {_list_experts(experts)}.{_by_chance(head)}"


def _list_experts(experts: Sequence[int]) -> str:
    """List the first experts by number."""
    more = f" and {len(experts) - _MAX_EXPERTS} more" if len(experts) > _MAX_EXPERTS else ""
    return ", ".join(map(str, experts[:_MAX_EXPERTS])) + more


def _by_chance(head: HeadUtilization) -> str:
    """Write a note for experts with few choices if an even router would leave as many experts empty by chance."""
    num_experts, share = len(head.load), head.num_choices / len(head.load)
    if head.soft or share >= MIN_FAIR_SHARE:
        return ""
    # counts of an even router are nearly Poisson distributed; five standard deviations more are not chance
    empty, expected = int((head.load == 0).sum()), num_experts * math.exp(-share)
    if empty > expected + 5 * math.sqrt(expected):
        return ""
    return f" The fair share is only {share:.1f} choices, so an even router can have such experts by chance."


def _classes(counts: Sequence[int], class_names: Sequence[str]) -> str:
    """List the most frequent classes of one expert, with their share of its rows."""
    total = sum(counts)
    first = sorted(range(len(counts)), key=lambda c: -counts[c])[:_TOP_CLASSES]
    if not total:
        return "–"
    names = {c: _escape(" ".join(class_names[c].split())) for c in first}
    return ", ".join(f"{names[c]} {counts[c] / total:.0%}" for c in first if counts[c])


def _cell(value: float | None) -> str:
    return "–" if value is None else "unknown" if math.isnan(value) else f"{value:.4g}"


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _escape(name: str) -> str:
    return name.replace("|", "/")
