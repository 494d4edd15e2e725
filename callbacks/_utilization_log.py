"""Log of the training epochs of expert utilization: numbers, warnings, figures, and the layout of their charts."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moe_heads.analysis.expert_utilization.figures import plot_load_history
from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.layer_figures import plot_dead_by_epoch, plot_load_by_layer
from moe_heads.analysis.expert_utilization.layers import Layer, training_numbers, worst_first
from moe_heads.analysis.expert_utilization.layout import utilization_charts
from moe_heads.analysis.expert_utilization.metric import utilization_scalars
from moe_heads.analysis.expert_utilization.training import RouterReport
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.routing import RoutingStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UtilizationLog"]

History = Mapping[str, Mapping[int, RoutingStats]]

# Largest number of heads with warnings in one epoch, of other heads that a warning names, and of heads with figures.
_MAX_WARNINGS, _MAX_NAMED, _NUM_WORST = 4, 8, 2


class UtilizationLog:
    """Log of one fit.

    Args:
        name: Name of the callback, the start of all keys.
        detail: Amount of the output.
        dead_below: Fraction of the fair share below which an expert is dead.
        starved_below: Fraction of the fair share below which it is starved.

    Attributes:
        name: Name of the callback.
    """

    def __init__(self, name: str, detail: Detail, dead_below: float, starved_below: float) -> None:
        self.name, self._detail, self._bounds = name, detail, (dead_below, starved_below)
        self._layers: dict[str, Layer] = {}
        self._soft: set[str] = set()
        self._has_layout = False

    def numbers(self, reports: Mapping[str, RouterReport], history: History) -> dict[str, float]:
        """Return the numbers of an epoch below ``<name>/<place>/``, on all ranks the same.

        Args:
            reports: Reports of the heads that ran in it.
            history: Statistics of the epochs so far. It decides whether the model has several heads.
        """
        self._soft |= {head for head, report in reports.items() if report.soft}
        self._layers = self._layers_of(reports)
        return training_numbers(self._layers, self._detail, len({*history, *reports}) > 1)

    def window_numbers(self, reports: Mapping[str, RouterReport], history: History) -> dict[str, float]:
        """Return the numbers of a window of training steps, by the same keys as `numbers`."""
        return training_numbers(self._layers_of(reports), self._detail, len({*history, *reports}) > 1)

    def _layers_of(self, reports: Mapping[str, RouterReport]) -> dict[str, Layer]:
        return {
            head: Layer.of_stats(reports[head].stats, reports[head].soft, *self._bounds, reports[head].scalars)
            for head in sorted(reports, key=_by_numbers)
        }

    def warnings(self, reports: Mapping[str, RouterReport]) -> Iterator[str]:
        """Yield the new warnings about the experts. A summary has those of four heads, and a line about the others."""
        affected = [head for head in worst_first(self._layers) if reports[head].warnings]
        is_short = self._detail == "full" or len(affected) <= _MAX_WARNINGS
        shown = affected if is_short else affected[:_MAX_WARNINGS]
        for head in shown:
            yield from (f"head {head!r}: {warning}" for warning in reports[head].warnings)
        if others := sorted(affected[len(shown) :], key=_by_numbers):
            named = ", ".join(map(repr, others[:_MAX_NAMED])) + (", …" if len(others) > _MAX_NAMED else "")
            yield f"there are new warnings of other heads ({len(others)}): {named}. Pass detail='full' to get them."

    def draw_epoch(self, context: ExecutionContext) -> None:
        """Write the map of the layers in the last epoch, and once in a fit the layout of the charts."""
        prefix, layers = f"{self.name}/epoch", self._layers
        if layers and not self._has_layout:
            self._has_layout = True
            sizes = {head: layer.num_experts for head, layer in layers.items()}
            context.log_charts(self.name, utilization_charts(prefix, sizes, self._detail))
        if len(layers) > 1:
            context.log_figures(prefix, lambda: {"load_by_layer": plot_load_by_layer(layers)[0]})

    def draw_history(self, context: ExecutionContext, history: History) -> None:
        """Write the load over the epochs of every head (of two, in a summary) and the dead experts by layer."""
        if history:
            context.log_figures(f"{self.name}/epoch", lambda: self._figures_of(history))

    def _figures_of(self, history: History) -> "dict[str, Figure]":
        heads = sorted(history, key=_by_numbers)
        last = {head: self._layer_of(head, history[head][max(history[head])]) for head in heads}
        shown = heads if self._detail == "full" else worst_first(last)[:_NUM_WORST]
        drawn = {f"{head}/load_over_epochs": plot_load_history(history[head])[0] for head in shown}
        if len(heads) > 1:
            dead = {
                head: {epoch: len(self._layer_of(head, stats).dead) for epoch, stats in history[head].items()}
                for head in heads
            }
            drawn["dead_experts_by_layer"] = plot_dead_by_epoch(dead)[0]
        return drawn

    def _layer_of(self, head: str, stats: RoutingStats) -> Layer:
        return Layer.of_stats(stats, head in self._soft, *self._bounds, utilization_scalars(stats))


def _by_numbers(name: str) -> list[str | int]:
    """Return a key that sorts "layers.2" before "layers.10"."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]
