"""Result of an expert utilization analysis: numbers, figures and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.classes import listed
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization, relative_load_percentiles
from moe_heads.analysis.expert_utilization.health import MIN_FAIR_SHARE
from moe_heads.checks import check_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ExpertUtilizationResult"]

# Largest number of classes in the table of the experts.
_TOP_CLASSES = 3

# Largest number of classes in a drawn class map: more rows than pixels cannot be read.
_MAX_DRAWN_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class ExpertUtilizationResult:
    """Expert utilization of every head with a router that ran. Each property is one quantity by head.

    Attributes:
        heads: Utilization by the name of the head ("head" when the model is itself the head). Empty for a model without
            a router, which is not an error, since a dense head has none.
        class_names: Names of the C classes. Empty without labels.
        num_samples: Number of samples of the data.
        partial: Reason why the analysis ended early, or "" if it is complete.
        no_classes: Reason why the quantities of classes are missing, for all heads or for some, or "" if none is.
        has_odd_labels: Whether there are labels that cannot be used, unlike data without labels.
        ignored_labels: Number of labels in the data by value that stands for no class.
        notes: What is not known of the routers of the model, and why.
    """

    heads: dict[str, HeadUtilization]
    class_names: tuple[str, ...]
    num_samples: int
    partial: str = ""
    no_classes: str = ""
    has_odd_labels: bool = False
    ignored_labels: dict[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def load(self) -> dict[str, Tensor]:
        """Load of each head, (E,)."""
        return {name: head.load for name, head in self.heads.items()}

    @property
    def importance(self) -> dict[str, Tensor]:
        """Importance of each head, (E,)."""
        return {name: head.importance for name, head in self.heads.items()}

    @property
    def entropy(self) -> dict[str, float]:
        """Mean entropy of the softmax of a row of each head, nats."""
        return {name: head.entropy for name, head in self.heads.items()}

    @property
    def class_map(self) -> dict[str, Tensor | None]:
        """Class map of each head, (C, E). None without labels."""
        return {name: head.class_map for name, head in self.heads.items()}

    @property
    def mutual_information(self) -> dict[str, float | None]:
        """Plug-in estimate of I(class; expert) of each head, nats. None without labels."""
        return {name: head.mutual_information for name, head in self.heads.items()}

    @property
    def dead_experts(self) -> dict[str, tuple[int, ...]]:
        """Dead experts of each head."""
        return {name: head.dead_experts for name, head in self.heads.items()}

    @property
    def relative_load_percentiles(self) -> dict[str, float]:
        """Percentiles of the load over the experts of all heads, in units of each head's fair share."""
        loads = [head.relative_load for head in self.heads.values()]
        return relative_load_percentiles(torch.cat(loads)) if loads else {}

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log, ``<head>/<quantity>``. They are empty for a model without a router.

        With several heads they include ``all_heads/relative_load_p<level>``.
        """
        values = {f"{name}/{key}": value for name, head in self.heads.items() for key, value in head.metrics().items()}
        if len(self.heads) > 1:
            values |= {f"all_heads/{key}": value for key, value in self.relative_load_percentiles.items()}
        return values | ({"partial": 1.0} if self.partial else {})

    def plot(self, ax: "Axes | None" = None, head: str | None = None) -> "tuple[Figure, Axes]":
        """Draw a heat map of classes by experts of one head, below bars of load and importance.

        Args:
            ax: Axes for the heat map alone (for the bars, without labels). The default is a new figure with both, which
                is not registered in pyplot.
            head: Name of the head. The default is the first.

        Raises:
            ValueError: If there is no such head, or no head at all.
        """
        from moe_heads.analysis.expert_utilization.figures import plot_utilization

        if not self.heads:
            raise ValueError(
                "head: expected a model with a router that ran, got one without. Check result.heads before plotting."
            )
        name = next(iter(self.heads)) if head is None else head
        check_option("head", name, self.heads)
        return plot_utilization(name, self.heads[name], self.class_names, ax)

    def figures(self) -> "dict[str, Figure]":
        """Draw all available figures, ``<head>/<figure>``: load, classes, coactivation, what_each_expert_sees."""
        from moe_heads.analysis.expert_utilization.example_grid import plot_examples
        from moe_heads.analysis.expert_utilization.figures import plot_classes, plot_coactivation, plot_load

        drawn: dict[str, Figure] = {}
        for name, head in self.heads.items():
            drawn[f"{name}/load"] = plot_load(name, head)[0]
            if head.class_map is not None and len(head.class_map) <= _MAX_DRAWN_CLASSES:
                drawn[f"{name}/classes"] = plot_classes(name, head, self.class_names)[0]
            if head.coactivation is not None:
                drawn[f"{name}/coactivation"] = plot_coactivation(name, head.coactivation)[0]
            if head.examples is not None:
                drawn[f"{name}/what_each_expert_sees"] = plot_examples(head.examples, self.class_names, head.load)
        return drawn

    def summary(self) -> str:
        """Write a Markdown table with one column per head."""
        if not self.heads:
            return "No router ran in this model: there are no experts to report on."
        columns = {name: head.metrics() for name, head in self.heads.items()}
        underused = [
            f"\n{state.title()} in {name}: {len(experts)} of {len(head.load)} experts, number "
            f"{', '.join(map(str, experts))}.{_by_chance(head)}"
            for name, head in self.heads.items()
            for state, experts in (("dead", head.dead_experts), ("starved", head.starved_experts))
            if experts
        ]
        underused += [
            f"\nInert in {name}: {len(head.inert_experts)} of {len(head.load)} experts, number"
            f" {', '.join(map(str, head.inert_experts))}. They receive rows, and their output is near zero."
            for name, head in self.heads.items()
            if head.inert_experts
        ]
        left_out = [f"\nNot known in {name}: {', '.join(h.left_out)}." for name, h in self.heads.items() if h.left_out]
        partial = [f"\n**Partial**: {self.partial}."] if self.partial else []
        notes = [f"\n{self.num_samples} samples. Entropies and mutual information are in nats."]
        if any(self.ignored_labels.values()):
            ignored = listed(self.ignored_labels)
            notes.append(
                f"\nLabels without a class (number): {ignored}. They count in all quantities except those of classes."
            )
        if self.no_classes:
            notes.append(f"\nNo classes: {self.no_classes}")
        notes += [f"\n{note.partition(chr(10))[0]}" for note in self.notes]
        return "\n".join([*_quantities_table(columns), *notes, *underused, *left_out, *partial])

    def texts(self) -> dict[str, str]:
        """Return the summary, and a table of the experts of each head."""
        experts = {f"{name}/experts": _experts_table(head, self.class_names) for name, head in self.heads.items()}
        return {"summary": self.summary(), **experts}


def _quantities_table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lines of a table with a row per quantity and a column per head.

    Args:
        columns: Quantities by name, by the name of the head.
    """
    names = list(columns)
    quantities = dict.fromkeys(quantity for values in columns.values() for quantity in values)
    rows = [[_cell(columns[name].get(quantity)) for name in names] for quantity in quantities]
    lines = [f"| {q.replace('_', ' ')} | {' | '.join(row)} |" for q, row in zip(quantities, rows, strict=True)]
    return [f"| quantity | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *lines]


def _experts_table(head: HeadUtilization, class_names: Sequence[str]) -> str:
    """Write a table with a row per expert: load, importance, classes, and the accuracy lost without it.

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
    named = {"weight norm": head.weight_norms, "stable rank": head.stable_ranks, "output norm": head.output_norms}
    columns |= {name: [_cell(value) for value in row.tolist()] for name, row in named.items() if row is not None}
    states = {"dead": head.dead_experts, "starved": head.starved_experts, "inert": head.inert_experts}
    state = {
        expert: f" ({', '.join(name for name, experts in states.items() if expert in experts)})"
        for expert in {expert for experts in states.values() for expert in experts}
    }
    rows = [
        f"| {expert}{state.get(expert, '')} | {' | '.join(column[expert] for column in columns.values())} |"
        for expert in range(len(head.load))
    ]
    notes = []
    if head.ablation is not None:
        notes.append(f"\nAccuracy with all experts: {head.ablation.accuracy:.2%}. ± is one paired standard error.")
    return "\n".join([f"| expert | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows, *notes])


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _classes(counts: Sequence[int], class_names: Sequence[str]) -> str:
    """List the most frequent classes of one expert, with their share of its rows."""
    total = sum(counts)
    first = sorted(range(len(counts)), key=lambda c: -counts[c])[:_TOP_CLASSES]
    if not total:
        return "–"
    names = {c: " ".join(class_names[c].split()).replace("|", "/") for c in first}
    return ", ".join(f"{names[c]} {counts[c] / total:.0%}" for c in first if counts[c])


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
