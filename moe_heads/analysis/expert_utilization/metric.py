"""Utilization of the experts of one router as a torchmetrics metric."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_heads.analysis.expert_utilization.head_utilization import relative_load_percentiles
from moe_heads.checks import check_at_least_one
from moe_heads.routing import Routing, RoutingStats

__all__ = ["MAX_CURVES", "ExpertUtilizationMetric", "utilization_scalars"]

MAX_CURVES = 16
"""Largest number of experts with curves of their own in a chart."""


class ExpertUtilizationMetric(Metric):
    r"""Metric of load, importance and balance of the experts of one router, over any number of batches and ranks.

    The states are sums over rows, which are added over the ranks. So uneven batches and uneven ranks are weighted by
    their rows, and counts are exact. Nothing is read from the device before `compute`.

    `compute` returns, by name:

    ============================  ======================================================================
    load_<e>, importance_<e>      fractions of expert e, which sum to 1 (only up to 16 experts)
    relative_load_p10, p50, p90   percentiles of the load over the experts, in units of the fair share
    load_cv                       coefficient of variation of the load
    max_violation                 :math:`E \max_e \text{load}_e - 1`
    effective_experts             :math:`\exp H(\text{importance})`
    entropy                       mean entropy of the full softmax of a row, nats, absent if unknown
    margin                        mean distance from a different choice, absent if unknown or without one
    dropped                       fraction of the rows that no expert took
    nonfinite                     fraction of the rows with nan or infinite logits, excluded elsewhere
    noise_agreement               fraction of the rows with the same choice with and without training noise
    ============================  ======================================================================

    The last is absent for a router without noise in training. The choice without noise is that of evaluation.

    Args:
        num_experts: E.
        kwargs: Further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.analysis import ExpertUtilizationMetric
        >>> head, metric = SparseMoE(16, 3, num_experts=4), ExpertUtilizationMetric(4)
        >>> metric.update(head(torch.randn(50, 16), return_routing=True).routing)
        >>> sorted(metric.compute())[:3]
        ['dropped', 'effective_experts', 'entropy']
    """

    num_compared: Tensor
    num_agreeing: Tensor
    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least_one(num_experts=num_experts)
        self.num_experts = num_experts
        for name in (f.name for f in fields(RoutingStats)):
            shape = (num_experts,) if name in ("counts", "gate_sum", "prob_sum") else ()
            is_count = name == "counts" or name.startswith("num_")
            default = torch.zeros(shape, dtype=torch.int64 if is_count else torch.float64)
            self.add_state(name, default, dist_reduce_fx="sum")
        for name in ("num_compared", "num_agreeing"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Add the rows of a batch.

        Raises:
            ValueError: If it is not a `Routing`, or its router has a different number of experts.
        """
        if not isinstance(routing, Routing):
            raise ValueError(f"routing: expected a moe_heads.Routing, got {type(routing).__name__}.")
        if routing.num_experts != self.num_experts:
            raise ValueError(f"routing: expected {self.num_experts} experts, got {routing.num_experts}.")
        stats = routing.stats()
        for f in fields(RoutingStats):
            setattr(self, f.name, getattr(self, f.name) + getattr(stats, f.name).to(self.device))
        if routing.noisy_logits is not None and routing.indices is not None:
            agreeing = (routing.agrees_without_noise & routing.valid).sum()
            self.num_compared = self.num_compared + stats.num_rows.to(self.device)
            self.num_agreeing = self.num_agreeing + agreeing.to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """Compute the numbers over all ranks. They are nan without a row."""
        stats = self.stats
        scalars = utilization_scalars(stats)
        if not int(stats.num_rows):
            known = {"nonfinite": scalars["nonfinite"]} if int(stats.num_nonfinite) else {}
            scalars = dict.fromkeys(scalars, math.nan) | known
        if int(self.num_compared):
            scalars |= {"noise_agreement": float(self.num_agreeing / self.num_compared)}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}

    @property
    def stats(self) -> RoutingStats:
        """Sums of this rank, and inside ``sync_context`` of all ranks."""
        return RoutingStats(**{f.name: getattr(self, f.name).clone() for f in fields(RoutingStats)})


def utilization_scalars(stats: RoutingStats) -> dict[str, float]:
    """Compute the numbers that are plotted over epochs; `ExpertUtilizationMetric` lists them.

    Args:
        stats: Sums over rows.
    """
    load, importance = stats.load.double().cpu(), stats.importance.double().cpu()
    scalars: dict[str, float] = {}
    if len(load) <= MAX_CURVES:
        for kind, shares in (("load", load), ("importance", importance)):
            scalars |= {f"{kind}_{expert}": share for expert, share in enumerate(shares.tolist())}
    relative = load * len(load)
    scalars |= relative_load_percentiles(relative)
    scalars |= {
        "load_cv": float(relative.std(correction=0)),
        "max_violation": float(relative.max()) - 1,
        "effective_experts": math.exp(float(torch.special.entr(importance).sum())),
        "entropy": float(stats.entropy),
        "margin": float(stats.margin),
        "dropped": float(stats.dropped),
        "nonfinite": float(stats.num_nonfinite / (stats.num_rows + stats.num_nonfinite).clamp_min(1)),
    }
    # the margin is infinite if there is no other choice; both are nan if the router is known by its output alone
    unknown = {name for name in ("entropy", "margin") if not math.isfinite(scalars[name])}
    return {name: value for name, value in scalars.items() if name not in unknown}
