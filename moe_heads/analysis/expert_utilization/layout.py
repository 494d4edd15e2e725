"""Charts of the training series of expert utilization for a page that shows the health of the model at one glance."""

import re
from collections.abc import Mapping

from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.metric import MAX_CURVES

__all__ = ["Charts", "utilization_charts"]

Charts = dict[str, tuple[str, list[str]]]
"""Charts by title, as `torch.utils.tensorboard.SummaryWriter.add_custom_scalars` expects them. A "Multiline" chart
draws every tag that matches one of its regular expressions. A "Margin" chart has the tags of a line and of the lower
and upper end of a band."""


def utilization_charts(prefix: str, num_experts: Mapping[str, int], detail: Detail) -> Charts:
    """Return the charts of a model.

    Args:
        prefix: Start of all tags, ``expert_utilization/epoch``.
        num_experts: Number of experts by the name of the head.
        detail: Detail of the logged numbers. See `ExpertUtilizationCallback`.
    """
    if detail == "summary" and len(num_experts) > 1:
        return _charts_of_summary(prefix)
    loads = {_title_of_load(name, number): _load_of(prefix, name, number) for name, number in num_experts.items()}
    experts = ("effective_experts", "num_dead_experts", "num_starved_experts", "num_inert_experts")
    rows = ("routing_flips", "noise_agreement", "dropped", "dropped_choices", "nonfinite")
    return loads | {
        "imbalance of the load (0: even)": _lines(prefix, "load_cv", "max_violation"),
        "number of experts: effective, dead, starved, inert": _lines(prefix, *experts),
        "router: entropy (nats), margin": _lines(prefix, "entropy", "margin"),
        "fraction of the rows: flips, agreement without noise, dropped, nonfinite": _lines(prefix, *rows),
        "weights: smallest norm and stable rank / median": _lines(prefix, "weight_norm_min", "stable_rank_min"),
        "gradient norm of the router": _lines(prefix, "router_gradient_norm"),
    }


def _charts_of_summary(prefix: str) -> Charts:
    def band(measure: str, line: str, low: str, high: str) -> tuple[str, list[str]]:
        return "Margin", [f"{prefix}/{measure}/{level}" for level in (line, low, high)]

    counts = ("num_dead_experts", "num_starved_experts", "num_inert_experts", "num_layers_with_dead_experts")
    # TensorBoard shows the multiline charts first, and after them the bands in reverse order
    return {
        "dead, starved and inert experts of all layers": (
            "Multiline",
            [f"{re.escape(prefix)}/{name}$" for name in counts],
        ),
        "routing flips: median, highest layer": _lines(prefix, "median", "highest", name="routing_flips"),
        "dropped rows and choices, nonfinite rows: worst layer": _lines(
            prefix, "worst", name="(dropped|dropped_choices|nonfinite)"
        ),
        "router entropy / log E: lowest, median, highest layer": band(
            "relative_entropy", "median", "lowest", "highest"
        ),
        "max violation (0: even): worst, median, best layer": band("max_violation", "median", "best", "worst"),
        "load CV (0: even): worst, median, best layer": band("load_cv", "median", "best", "worst"),
        "effective experts / experts (1: even): worst, median, best layer": band(
            "relative_effective_experts", "median", "worst", "best"
        ),
        "load / fair share: p10, p50, p90 of all experts": band("relative_load", "p50", "p10", "p90"),
    }


def _title_of_load(name: str, num_experts: int) -> str:
    if num_experts <= MAX_CURVES:
        return f"{name}: load of each expert"
    return f"{name}: load / fair share, p10, p50, p90 of the experts"


def _load_of(prefix: str, name: str, num_experts: int) -> tuple[str, list[str]]:
    if num_experts <= MAX_CURVES:
        return _lines(prefix, r"load_\d+", name=re.escape(name))
    return "Margin", [f"{prefix}/{name}/relative_load_p{level}" for level in (50, 10, 90)]


def _lines(prefix: str, *quantities: str, name: str = ".+") -> tuple[str, list[str]]:
    """Return a chart of quantities of all heads, or of those whose names match a regular expression."""
    return "Multiline", [f"{re.escape(prefix)}/{name}/{quantity}$" for quantity in quantities]
