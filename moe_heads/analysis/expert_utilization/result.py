"""What an expert utilization analysis found, and how it is reported."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.head import HeadUtilization, relative_load_percentiles
from moe_heads.analysis.expert_utilization.health import LEAST_EXPECTED
from moe_heads.analysis.expert_utilization.tables import experts_table, quantities_table
from moe_heads.checks import check_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ExpertUtilizationResult"]


@dataclass(frozen=True, eq=False)
class ExpertUtilizationResult:
    """Expert utilization of every head of a model that has a router and ran; the properties give one quantity by head.

    Attributes:
        heads: Utilization by the name of the head ("head" when the model is itself the head); empty for a model without
            a router, which is no error: a dense head has none.
        class_names: Names of the C classes; empty without labels.
        num_samples: Samples of the data.
        partial: Why the analysis ended before its time; "" for one that is whole.
    """

    heads: dict[str, HeadUtilization]
    class_names: tuple[str, ...]
    num_samples: int
    partial: str = ""

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
        """Mean entropy of a row's softmax of each head, nats."""
        return {name: head.entropy for name, head in self.heads.items()}

    @property
    def class_map(self) -> dict[str, Tensor | None]:
        """Class map of each head, (C, E); None without labels."""
        return {name: head.class_map for name, head in self.heads.items()}

    @property
    def mutual_information(self) -> dict[str, float | None]:
        """Plug-in I(class; top expert) of each head, nats; None without labels."""
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
        """The numbers to log, ``<head>/<quantity>``; empty for a model without a router.

        Of several heads also ``all_heads/relative_load_p<level>``.
        """
        values = {f"{name}/{key}": value for name, head in self.heads.items() for key, value in head.metrics().items()}
        if len(self.heads) > 1:
            values |= {f"all_heads/{key}": value for key, value in self.relative_load_percentiles.items()}
        return values | ({"partial": 1.0} if self.partial else {})

    def plot(self, ax: "Axes | None" = None, head: str | None = None) -> "tuple[Figure, Axes]":
        """Heat map of classes by experts of one head, below bars of load and importance.

        Args:
            ax: Axes for the heat map alone (for the bars, without labels); by default those of a new figure that pyplot
                does not know, with both.
            head: Name of the head; by default the first.

        Raises:
            ValueError: If there is no such head, or none at all.
        """
        from moe_heads.analysis.expert_utilization.figures import plot_utilization

        if not self.heads:
            raise ValueError("head: expected a model with a router that ran; this one has none, and nothing to draw")
        name = next(iter(self.heads)) if head is None else head
        check_option("head", name, self.heads)
        return plot_utilization(name, self.heads[name], self.class_names, ax)

    def figures(self) -> "dict[str, Figure]":
        """All that can be drawn, ``<head>/<figure>``: load, classes, coactivation, what_each_expert_sees."""
        from moe_heads.analysis.expert_utilization.example_grid import plot_examples
        from moe_heads.analysis.expert_utilization.figures import plot_classes, plot_coactivation, plot_load

        drawn: dict[str, Figure] = {}
        for name, head in self.heads.items():
            drawn[f"{name}/load"] = plot_load(name, head)[0]
            if head.class_map is not None:
                drawn[f"{name}/classes"] = plot_classes(name, head, self.class_names)[0]
            if head.coactivation is not None:
                drawn[f"{name}/coactivation"] = plot_coactivation(name, head.coactivation)[0]
            if head.examples is not None:
                drawn[f"{name}/what_each_expert_sees"] = plot_examples(head.examples, self.class_names, head.load)
        return drawn

    def summary(self) -> str:
        """Markdown table with one column a head."""
        if not self.heads:
            return "No router ran in this model: there are no experts to report on."
        columns = {name: head.metrics() for name, head in self.heads.items()}
        told = [
            f"\n{state.title()} in {name}: {len(experts)} of {len(head.load)} experts, number "
            f"{', '.join(map(str, experts))}.{_by_chance(head)}"
            for name, head in self.heads.items()
            for state, experts in (("dead", head.dead_experts), ("starved", head.starved_experts))
            if experts
        ]
        partial = [f"\n**Partial**: {self.partial}."] if self.partial else []
        notes = [f"\n{self.num_samples} samples; entropies and information in nats."]
        if not self.class_names:
            notes.append(
                "\nNo classes: the batches have no labels of shape (B,), or none is a class. `label_fn` can give them."
            )
        return "\n".join([*quantities_table(columns), *notes, *told, *partial])

    def texts(self) -> dict[str, str]:
        """The summary, and a table of the experts of each head."""
        experts = {f"{name}/experts": experts_table(head, self.class_names) for name, head in self.heads.items()}
        return {"summary": self.summary(), **experts}


def _by_chance(head: HeadUtilization) -> str:
    """What to say of experts without rows where the rows are too few to tell, and so few are without by chance."""
    num_experts, share = len(head.load), head.num_choices / len(head.load)
    if head.soft or share >= LEAST_EXPECTED:
        return ""
    # counts of an even router are about Poisson's; more empty experts than five standard deviations are no chance
    empty, expected = int((head.load == 0).sum()), num_experts * math.exp(-share)
    if empty > expected + 5 * math.sqrt(expected):
        return ""
    return f" The fair share is {share:.1f} choices: chance alone leaves experts of an even router with so few."
