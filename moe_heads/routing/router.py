"""Base class of all routers."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from moe_heads.routing.routing import Routing

__all__ = ["Router"]


class Router(nn.Module, ABC):
    """Base of all routers: a module from rows (N, D) to a `Routing`. `collect_routing` finds routers by this class.

    A custom router needs `forward`. It works in a `SparseMoE` if it has ``num_experts`` and ``k``, and in
    `fixed_routing` if it defines `rechosen`. For padded tokens, its `forward` takes ``mask`` too and passes it to the
    `Routing`.

    Attributes:
        num_experts: E.
        k: Mean number of experts that run for a row. None when all of them do.
        takes_mask: Whether `forward` has the argument ``mask``.
    """

    num_experts: int
    k: float | None = None
    takes_mask: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.takes_mask = "mask" in inspect.signature(cls.forward).parameters

    @abstractmethod
    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D).

        A router that supports padding has a third argument, ``mask``: the rows that are real, (N,), bool, or None.

        Args:
            x: Rows.
            rows_per_sample: T. The rows of a sample are consecutive.
        """

    def route(self, x: Tensor, rows_per_sample: int, mask: Tensor | None) -> Routing:
        """Call the router, with the mask if there is one.

        Raises:
            ValueError: If there is a mask and `forward` has no argument for it.
        """
        if mask is None:
            return self(x, rows_per_sample)  # type: ignore[no-any-return]
        self.check_takes_mask()
        return self(x, rows_per_sample, mask=mask)  # type: ignore[no-any-return]

    def check_takes_mask(self) -> None:
        """Raise a ValueError if `forward` has no argument for a mask."""
        if not self.takes_mask:
            raise ValueError(
                f"mask: expected a router whose forward takes a mask, got {type(self).__name__}. Add the argument"
                " mask=None to its forward and pass it on to the Routing."
            )

    def num_choices(self, batch: int, tokens: int) -> float:
        """Count the pairs of a row and an expert that runs for it, for ``batch`` samples of ``tokens`` tokens each."""
        return batch * tokens * (self.num_experts if self.k is None else self.k)

    def active_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that are used in evaluation."""
        return self.parameters()

    def keep(self, experts: Sequence[int]) -> "Router":
        """Return a copy of the router with only these experts, for `moe_heads.ablate`.

        Args:
            experts: Indices to keep, ascending.

        Raises:
            ValueError: If the router does not define this method.
        """
        raise ValueError(
            f"head: expected a router that defines keep(experts), got {type(self).__name__}. Define the method to"
            " remove experts."
        )

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """Return the choices of ``reference`` with the current mixing weights of this router.

        Logits, probabilities and scores are those of ``routing``, and the weights follow from them with their
        gradient. Only the comparison of the scores has the outcome of ``reference``. ``rechosen(routing, routing)`` is
        bit for bit ``routing``. A soft routing has no choices and is returned unchanged.

        Args:
            routing: Current decisions of the router.
            reference: Routing with the choices to use, for as many rows and experts.

        Raises:
            ValueError: If the router is sparse and does not define this method.
        """
        if routing.soft:
            return routing
        raise ValueError(
            f"model: expected routers that define rechosen(routing, reference), got {type(self).__name__}. Define the"
            " method to hold its choices fixed."
        )
