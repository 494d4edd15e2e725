"""Sums of a router over training steps, which are additive over windows of steps and over ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.metric import utilization_scalars
from moe_heads.routing import RoutingStats, map_packed

__all__ = ["RouterSums", "add_over_ranks"]


@dataclass(frozen=True)
class RouterSums:
    """Sums of one router over training steps. Counts are int64 and exact, the other sums float64.

    Attributes:
        stats: Statistics of its decisions.
        num_compared: Number of rows whose choice was compared with that without noise, scalar.
        num_agreeing: Number of them with the same choice, scalar.
        norm_sum: Sum of the measured norms of the router's gradient, scalar.
        num_norms: Number of these norms, scalar.
    """

    stats: RoutingStats
    num_compared: Tensor
    num_agreeing: Tensor
    norm_sum: Tensor
    num_norms: Tensor

    def __add__(self, other: "RouterSums") -> "RouterSums":
        return _of_tensors([mine + its for mine, its in zip(_tensors_of(self), _tensors_of(other), strict=True)])

    def cpu(self) -> "RouterSums":
        """Return the same sums on the CPU."""
        return _of_tensors([tensor.cpu() for tensor in _tensors_of(self)])

    @property
    def is_empty(self) -> bool:
        """True if the router made no decision, not even with non-finite logits."""
        return not int(self.stats.num_rows) and not int(self.stats.num_nonfinite)

    def scalars(self) -> dict[str, float]:
        """Return the numbers of `ExpertUtilizationMetric`, and ``router_gradient_norm`` if a norm was measured."""
        numbers = utilization_scalars(self.stats, self.num_compared, self.num_agreeing)
        if int(self.num_norms):
            numbers["router_gradient_norm"] = float(self.norm_sum / self.num_norms)
        return numbers


def add_over_ranks(sums: Mapping[str, RouterSums], ranks: Ranks) -> dict[str, RouterSums]:
    """Add the sums of each router over the ranks, with two collectives for all routers together.

    Args:
        sums: Sums of this rank by the name of the router. Every rank passes the same routers in the same order.
        ranks: The ranks.

    Returns:
        The sums over the ranks, on the CPU.
    """
    tensors = [tensor for own in sums.values() for tensor in _tensors_of(own)]
    # routers may run on different devices
    device = tensors[0].device if tensors else None
    total = map_packed([tensor.to(device) for tensor in tensors], ranks.all_reduce)
    each = len(tensors) // max(1, len(sums))
    return {name: _of_tensors(total[each * place : each * (place + 1)]) for place, name in enumerate(sums)}


def _tensors_of(sums: RouterSums) -> list[Tensor]:
    decisions = [getattr(sums.stats, f.name) for f in fields(RoutingStats)]
    return [*decisions, sums.num_compared, sums.num_agreeing, sums.norm_sum, sums.num_norms]


def _of_tensors(tensors: list[Tensor]) -> RouterSums:
    num_of_decisions = len(fields(RoutingStats))
    return RouterSums(RoutingStats(*tensors[:num_of_decisions]), *tensors[num_of_decisions:])
