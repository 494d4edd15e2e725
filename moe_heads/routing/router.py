"""The protocol of all routers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from moe_heads.routing.routing import Routing

__all__ = ["Router"]


class Router(nn.Module, ABC):
    """Base of all routers: a module from rows (N, D) to a `Routing`. `collect_routing` finds them by this class.

    A router of your own needs `forward`; with ``num_experts`` and ``k`` it serves in a `SparseMoE`, with `rechosen` in
    `fixed_routing`.

    Attributes:
        num_experts: E.
        k: Experts that run for a row, on average; None when all of them do.
    """

    num_experts: int
    k: float | None = None

    @abstractmethod
    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D)."""

    def num_choices(self, batch: int, tokens: int) -> float:
        """Pairs of a row and an expert that runs for it, in a batch of so many samples of so many tokens."""
        return batch * tokens * (self.num_experts if self.k is None else self.k)

    def active_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that take part in evaluation."""
        return self.parameters()

    def keep(self, experts: Sequence[int]) -> "Router":
        """A copy of the router that knows these experts only, for `moe_heads.ablate`.

        Args:
            experts: Indices to keep, ascending.

        Raises:
            ValueError: If the router does not say how.
        """
        raise ValueError(f"head: expected a router that defines keep(experts); {type(self).__name__} does not")

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """The choices of ``reference`` with the mixing weights that this router gives them now.

        As if the comparison of the scores had come out as in ``reference``: logits, probabilities and scores are those
        of ``routing``, and the weights follow from them with their gradient. ``rechosen(routing, routing)`` is
        ``routing``, to the bit. A soft routing chooses nothing and stays as it is.

        Args:
            routing: What the router has just decided.
            reference: Gives the choices, of as many rows and experts.

        Raises:
            ValueError: If the router chooses and does not say how it weights.
        """
        if routing.soft:
            return routing
        raise ValueError(
            f"model: expected routers that define rechosen(routing, reference); {type(self).__name__} does not"
        )
