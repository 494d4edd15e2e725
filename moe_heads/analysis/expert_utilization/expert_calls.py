"""Calls of single experts, by the convention with which the model calls them.

The hooks record the first call of the experts in a pass. Before any other rows run, the recorded call is repeated, and
has to give the recorded outputs.

Shapes: N rows, D features, E experts, K choices of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights, UnknownExpertsError
from moe_heads.experts import Experts

__all__ = ["NUM_COMPARED", "ExpertCalls", "OwnExperts", "SeparateExperts", "check_equal"]

NUM_COMPARED = 4
"""Rows of a recorded call of each expert that are compared."""


class ExpertCalls(ABC):
    """Recorded calls of a router and its experts in a pass, and calls of single experts.

    Args:
        router: The router.
        experts: Its experts.
        num_experts: E.
        max_rows: Number of rows to keep.
    """

    def __init__(self, router: nn.Module, experts: ExpertWeights, num_experts: int, max_rows: int) -> None:
        self.num_experts = num_experts
        self._router, self.experts, self._max_rows = router, experts, max_rows
        self._rows: Tensor | None = None
        self._num_rows = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the first pass in the block."""
        with ExitStack() as stack:
            self._add_hooks(stack)
            yield

    def _add_hooks(self, stack: ExitStack) -> None:
        stack.callback(self._router.register_forward_pre_hook(self._note_rows, with_kwargs=True).remove)

    def _note_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self._rows is None and given is not None and given.is_floating_point() and given.dim() >= 2:
            rows = given.detach().flatten(0, -2)
            # a copy: a view would keep the whole activation in memory, and a module may overwrite its input
            self._rows, self._num_rows = rows[: self._max_rows].clone(), len(rows)

    def clear(self) -> None:
        """Forget the recorded pass."""
        self._rows, self._num_rows = None, 0

    def check_pass(self) -> int:
        """Check that the recorded calls follow the convention, and return the number of rows of the pass.

        Raises:
            UnknownExpertsError: If they do not, or there are none.
        """
        if self._rows is None:
            raise UnknownExpertsError("the router was not called with rows (..., D) as its first tensor")
        self._check_calls(self._rows)
        return self._num_rows

    @abstractmethod
    def _check_calls(self, rows: Tensor) -> None:
        """Check the recorded calls of the experts."""

    @abstractmethod
    def outputs(self, kept: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert with its output for some rows of the recorded pass, without its mixing weight.

        The rows of an expert may come in several parts.

        Args:
            kept: Indices of the rows.
        """

    def kept_rows(self, kept: Tensor) -> Tensor:
        """Return the input of the router at some indices, in the data type of the weights."""
        assert self._rows is not None
        return self.cast(self._rows[kept.to(self._rows.device)])

    def cast(self, rows: Tensor) -> Tensor:
        """Convert rows to the data type of the weights, since autocast of the pass is over."""
        matrix = next(iter(self.experts.matrices.values()))[0]
        return rows.to(matrix.dtype)


class OwnExperts(ExpertCalls):
    """Experts of this package, whose input is that of the router."""

    @override
    def _check_calls(self, rows: Tensor) -> None:
        pass  # the heads of this package need no check

    @override
    def outputs(self, kept: Tensor) -> Iterator[tuple[int, Tensor]]:
        rows, experts = self.kept_rows(kept), self.experts.module
        assert isinstance(experts, Experts)
        for expert, (weight1, bias1, weight2, bias2) in enumerate(zip(*experts.stacks(), strict=True)):
            yield expert, F.linear(experts.activate(F.linear(rows, weight1, bias1)), weight2, bias2)


class SeparateExperts(ExpertCalls):
    """Experts that are modules, each called with rows of the router."""

    def __init__(self, router: nn.Module, experts: ExpertWeights, num_experts: int, max_rows: int) -> None:
        super().__init__(router, experts, num_experts, max_rows)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._unlike = ""

    @override
    def clear(self) -> None:
        super().clear()
        self._seen, self._unlike = {}, ""

    @override
    def _add_hooks(self, stack: ExitStack) -> None:
        super()._add_hooks(stack)
        for expert, member in enumerate(self.experts.members):

            def note(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, expert: int = expert
            ) -> None:
                if expert in self._seen:
                    return
                if kwargs or len(args) != 1 or not all(_is_rows(value) for value in (*args, output)):
                    # not raised: the pass of the model has to go on
                    self._unlike = "an expert was called with more than rows (..., D), or returned something else"
                    return
                given, got = (value.detach().flatten(0, -2)[:NUM_COMPARED].clone() for value in (args[0], output))
                self._seen[expert] = given, got

            stack.callback(member.register_forward_hook(note, with_kwargs=True).remove)

    @override
    def _check_calls(self, rows: Tensor) -> None:
        if self._unlike or not self._seen:
            raise UnknownExpertsError(self._unlike or "no expert was called in the pass of the router")
        num_found = num_compared = 0
        for expert, (given, got) in self._seen.items():
            if given.shape[1:] != rows.shape[1:]:
                raise UnknownExpertsError("the experts were called with other features than the router")
            again = self.experts.members[expert].forward(self.cast(given))
            check_equal(again, got, given)
            # capacity leaves rows of zeros in the input of an expert
            nonzero = given[given.any(1)]
            num_compared += len(nonzero)
            num_found += int((nonzero.unsqueeze(1) == rows).all(-1).any(-1).sum())
        has_all_rows = len(rows) == self._num_rows
        if num_found < (num_compared if has_all_rows else 1) or not num_compared:
            raise UnknownExpertsError("the experts were called with other rows than the router")

    @override
    def outputs(self, kept: Tensor) -> Iterator[tuple[int, Tensor]]:
        rows = self.kept_rows(kept)
        for expert, member in enumerate(self.experts.members):
            # not the call: hooks of the user would run for rows that the model did not pass
            yield expert, member.forward(rows)


def _is_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def check_equal(again: Tensor, recorded: Tensor, *inputs: Tensor) -> None:
    """Check that a repeated call gives the recorded outputs, up to the square root of the rounding error.

    Args:
        again: Outputs of the repeated call.
        recorded: Recorded outputs.
        *inputs: Recorded inputs, whose data types count too: a model under autocast computes in the lowest.

    Raises:
        UnknownExpertsError: If it does not.
    """
    tolerance = max(torch.finfo(value.dtype).eps for value in (again, recorded, *inputs)) ** 0.5
    if again.shape != recorded.shape:
        raise UnknownExpertsError(
            f"the experts returned {tuple(again.shape)} on their own and {tuple(recorded.shape)} in the model"
        )
    wide = recorded.double() if recorded.device.type != "mps" else recorded.float()
    error, size = (again.to(wide) - wide).norm(), wide.norm()
    if not bool(error <= tolerance * size):
        raise UnknownExpertsError(
            f"the experts on their own do not give the outputs that they had in the model, with a relative error of"
            f" {float(error / size):.1g}"
        )
