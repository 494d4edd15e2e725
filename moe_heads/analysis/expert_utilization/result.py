"""Result of an expert utilization analysis: numbers, figures and tables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.head_utilization import Detail, HeadUtilization, relative_load_percentiles
from moe_heads.analysis.expert_utilization.layers import Layer, summarize_layers, worst_first
from moe_heads.analysis.expert_utilization.tables import experts_table, heads_table, layers_table
from moe_heads.checks import check_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ExpertUtilizationResult"]

# Largest number of heads with a column each in the table of the summary.
_MAX_COLUMNS = 4

# Number of heads with figures and a table of experts of their own in the summary of a model with several.
_NUM_WORST = 2


@dataclass(frozen=True, eq=False)
class ExpertUtilizationResult:
    """Expert utilization of every head with a router that ran. Each property is one quantity by head.

    Attributes:
        heads: Utilization by the name of the head ("head" when the model is itself the head). Empty for a model without
            a router, which is not an error, since a dense head has none.
        class_names: Names of the C classes. Empty without labels.
        num_samples: Number of samples of the data.
        partial: Reason why the analysis ended early, or "" if it is complete.
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

    def metrics(self, detail: Detail = "full") -> dict[str, float]:
        """Return the numbers to log. They are empty for a model without a router.

        Args:
            detail: "full" for all numbers of every head, ``<head>/<quantity>``, and with several heads
                ``all_heads/relative_load_p<level>``. "summary" for the most important ones of a single head, and of
                several heads a summary over the layers instead, ``<measure>/<worst|median|best>``, whose size does not
                depend on their number.
        """
        values: dict[str, float]
        if detail == "summary" and len(self.heads) > 1:
            values = summarize_layers(self._layers)
        else:
            values = {
                f"{n}/{key}": value for n, head in self.heads.items() for key, value in head.metrics(detail).items()
            }
        if detail == "full" and len(self.heads) > 1:
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

    def figures(self, detail: Detail = "full") -> "dict[str, Figure]":
        """Draw the figures ``<head>/<figure>``: load, classes, coactivation, what_each_expert_sees.

        With several heads also ``load_by_layer``, a map of all layers by experts.

        Args:
            detail: "full" for the figures of every head. "summary" for those of the two with the worst balance.
        """
        from moe_heads.analysis.expert_utilization.example_grid import plot_examples
        from moe_heads.analysis.expert_utilization.figures import plot_classes, plot_coactivation, plot_load
        from moe_heads.analysis.expert_utilization.layer_figures import plot_load_by_layer

        drawn: dict[str, Figure] = {}
        if len(self.heads) > 1:
            drawn["load_by_layer"] = plot_load_by_layer(self._layers)[0]
        for name in self._shown(detail):
            head = self.heads[name]
            drawn[f"{name}/load"] = plot_load(name, head)[0]
            if head.class_map is not None:
                drawn[f"{name}/classes"] = plot_classes(name, head, self.class_names)[0]
            if head.coactivation is not None:
                drawn[f"{name}/coactivation"] = plot_coactivation(name, head.coactivation)[0]
            if head.examples is not None:
                drawn[f"{name}/what_each_expert_sees"] = plot_examples(head.examples, self.class_names, head.load)
        return drawn

    def summary(self) -> str:
        """Write a Markdown table with one column per head. Of more than four heads it names the worst ones instead."""
        if not self.heads:
            return "No router ran in this model: there are no experts to report on."
        table = heads_table(self.heads) if len(self.heads) <= _MAX_COLUMNS else layers_table(self.heads)
        partial = [f"\n**Partial**: {self.partial}."] if self.partial else []
        notes = [f"\n{self.num_samples} samples. Entropies and mutual information are in nats."]
        if not self.class_names:
            notes.append(
                "\nNo classes: the batches have no labels of shape (B,), or the labels are not classes. Pass `label_fn`"
                " to provide them."
            )
        return "\n".join([table, *notes, *partial])

    def texts(self, detail: Detail = "full") -> dict[str, str]:
        """Return the summary, and tables of experts, ``<head>/experts``.

        Args:
            detail: "full" for a table of every head, "summary" for tables of the two with the worst balance.
        """
        experts = {f"{name}/experts": experts_table(self.heads[name], self.class_names) for name in self._shown(detail)}
        return {"summary": self.summary(), **experts}

    @property
    def _layers(self) -> dict[str, Layer]:
        return {name: Layer.of_head(head) for name, head in self.heads.items()}

    def _shown(self, detail: Detail) -> list[str]:
        return list(self.heads) if detail == "full" else worst_first(self._layers)[:_NUM_WORST]
