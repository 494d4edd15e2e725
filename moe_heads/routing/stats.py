"""Statistics of a router as sums over rows, which are additive over batches and ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RoutingStats", "map_packed"]


@dataclass(frozen=True)
class RoutingStats:
    """Sums over rows of the decisions of a router, detached, on the device of the router.

    Add the statistics of several batches with ``+`` and those of all ranks with `all_reduce`. The properties are ratios
    of the sums. Counts are int64 and exact. The other sums are float64 (fp32 on a device without it), so that the
    order of the batches changes the last digits at most. E experts.

    Attributes:
        counts: Number of rows assigned to each expert, (E,), int64. A soft router chooses the expert with the largest
            gate.
        gate_sum: Sum of the mixing weights, (E,): Shazeer's importance.
        prob_sum: Sum of the full softmax, (E,): the probability mass of an expert, chosen or not.
        entropy_sum: Sum over rows of the entropy of the full softmax, scalar, nats.
        margin_sum: Sum over rows of `Routing.margin`, scalar, in the unit of the compared scores.
        num_dropped: Number of rows that no expert took, scalar, int64.
        num_rows: Number of routed rows, scalar, int64, dropped ones included.
        num_dropped_choices: Number of choices that the router dropped, scalar, int64, because the capacity of an expert
            was exceeded for example. ``counts`` does not include them.
        num_nonfinite: Number of rows with nan or infinite logits, scalar, int64. No other sum includes them.
    """

    counts: Tensor
    gate_sum: Tensor
    prob_sum: Tensor
    entropy_sum: Tensor
    margin_sum: Tensor
    num_dropped: Tensor
    num_rows: Tensor
    num_nonfinite: Tensor
    num_dropped_choices: Tensor = field(default_factory=lambda: torch.tensor(0))  # checkpoints of before lack it

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        return RoutingStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> "RoutingStats":
        """Sum over all ranks, with one collective for the counts and one for the other sums.

        Every rank of the group must call it, with the statistics of the same router.

        Args:
            group: Process group. None is the default group.

        Returns:
            The sums over the ranks, or the statistics themselves if `torch.distributed` is not initialized.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self

        def reduce(packed: Tensor) -> Tensor:
            dist.all_reduce(packed, group=group)
            return packed

        return RoutingStats(*map_packed([getattr(self, f.name) for f in fields(self)], reduce))

    def cpu(self) -> "RoutingStats":
        """Return the same sums on the CPU."""
        return RoutingStats(*(getattr(self, f.name).cpu() for f in fields(self)))

    @property
    def load(self) -> Tensor:
        """Fraction of the choices assigned to each expert, (E,). Sums to 1."""
        counts = self.counts.to(self.gate_sum.dtype)
        return counts / counts.sum().clamp_min(1)

    @property
    def importance(self) -> Tensor:
        """Fraction of the mixing weight of each expert, (E,). Sums to 1."""
        return self.gate_sum / self.gate_sum.sum().clamp_min(torch.finfo(self.gate_sum.dtype).tiny)

    @property
    def mean_probs(self) -> Tensor:
        """Mean of the full softmax, (E,). Sums to 1."""
        return self.prob_sum / self.num_rows.clamp_min(1)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the full softmax of a row, scalar, nats."""
        return self.entropy_sum / self.num_rows.clamp_min(1)

    @property
    def margin(self) -> Tensor:
        """Mean margin to the next expert, scalar. Infinite where there is no next one."""
        return self.margin_sum / self.num_rows.clamp_min(1)

    @property
    def dropped(self) -> Tensor:
        """Fraction of the rows that no expert took, scalar."""
        return self.num_dropped / self.num_rows.clamp_min(1)

    @property
    def dropped_choices(self) -> Tensor:
        """Fraction of the choices that the router dropped, scalar."""
        return self.num_dropped_choices / (self.counts.sum() + self.num_dropped_choices).clamp_min(1)


def map_packed(tensors: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a function to tensors as two vectors, one of the integers and one of the floating-point numbers.

    Two collectives, or two copies from a device, then serve any number of tensors.

    Args:
        tensors: Tensors on one device. Integers have one data type, and floating-point numbers have one.
        function: ``function(vector) -> vector`` of the same length. It is not called without a number.

    Returns:
        The parts of the vectors, with the shapes of the tensors.
    """
    mapped = list(tensors)
    for floating in (False, True):
        places = [place for place, tensor in enumerate(tensors) if tensor.is_floating_point() == floating]
        if not places:
            continue
        vector = function(torch.cat([tensors[place].flatten() for place in places]))
        parts = vector.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            mapped[place] = part.view(tensors[place].shape)
    return mapped
