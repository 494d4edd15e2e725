"""Norm of the outputs of each expert of a router, on the rows that reached the router.

Shapes: N rows, D features, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.expert_utilization.expert_calls import ExpertCalls, OwnExperts, SeparateExperts
from moe_heads.analysis.expert_utilization.expert_weights import (
    ExpertWeights,
    UnknownExpertsError,
    find_experts,
    num_experts_of,
)
from moe_heads.analysis.expert_utilization.fused_calls import FusedExperts
from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["MAX_ROWS", "OutputNorms", "OutputProbes"]

MAX_ROWS = 1024
"""Number of rows on which all experts run. The standard error of a mean norm is then 3 % if the norms of an expert vary
by as much as their mean, far below the factors that tell an inert expert from a healthy one."""


@dataclass(frozen=True, eq=False)
class OutputNorms:
    """Sums over rows of the norms of the outputs of each expert.

    Attributes:
        totals: Sums of the L2 norms, (E,), float64, on the CPU. None if they are not known.
        num_rows: Number of rows.
        reason: Reason why the norms are not known, or "".
    """

    totals: Tensor | None
    num_rows: int = 0
    reason: str = ""

    def __add__(self, other: "OutputNorms") -> "OutputNorms":
        """Add the sums over other rows. They are unknown if one of the two is unknown for a reason."""
        reason = self.reason or other.reason
        if reason or self.totals is None or other.totals is None:
            known = self if other.totals is None else other
            return OutputNorms(None, 0, reason) if reason else known
        return OutputNorms(self.totals + other.totals, self.num_rows + other.num_rows)

    @property
    def means(self) -> Tensor | None:
        """Mean norm of the output of each expert, (E,), or None."""
        return self.totals / self.num_rows if self.totals is not None and self.num_rows else None


class OutputProbes:
    """Hooks that record what reaches the routers and experts of a model, to run all experts on the same rows.

    Args:
        model: The model.
        routers: Its routers by name.
        max_rows: Largest number of rows of a router.
    """

    def __init__(self, model: nn.Module, routers: Mapping[str, nn.Module], max_rows: int) -> None:
        self._max_rows = max_rows
        self._calls: dict[str, ExpertCalls] = {}
        self._unknown: dict[str, OutputNorms] = {}
        for name, router in routers.items():
            num_experts = num_experts_of(router)
            try:
                if num_experts is None:
                    raise UnknownExpertsError(
                        "the router states no number of experts, such as an attribute num_experts"
                    )
                experts = find_experts(model, router, num_experts)
                self._calls[name] = _kind_of(experts, router)(router, experts, num_experts, max_rows)
            except UnknownExpertsError as error:
                self._unknown[name] = OutputNorms(None, reason=str(error))

    @contextmanager
    def listening(self, num_done: Mapping[str, int]) -> Iterator[None]:
        """Record the first pass of each router in the block, unless it has all its rows.

        Args:
            num_done: Number of rows of each router so far.
        """
        with ExitStack() as stack:
            for name, calls in self._calls.items():
                calls.clear()
                if num_done.get(name, 0) < self._max_rows:
                    stack.enter_context(calls.listening())
            yield

    @torch.no_grad()
    def norms(self, routings: Mapping[str, list[Routing]], num_done: Mapping[str, int]) -> dict[str, OutputNorms]:
        """Run the experts of each recorded router, and return the norms of their outputs.

        Args:
            routings: Decisions of the recorded passes. They have the masks of padded rows.
            num_done: Number of rows of each router so far.
        """
        found = dict(self._unknown)
        for name, calls in self._calls.items():
            passes = routings.get(name)
            num_left = self._max_rows - num_done.get(name, 0)
            if not passes or num_left <= 0:
                continue
            try:
                found[name] = self._norms(calls, passes[0], num_left)
            except UnknownExpertsError as error:
                found[name] = OutputNorms(None, reason=str(error))
            except Exception as error:
                # modules of other libraries may raise anything, and the other numbers do not depend on them
                if is_out_of_memory(error):
                    raise
                found[name] = OutputNorms(None, reason=f"the experts failed: {type(error).__name__}: {error}")
            finally:
                calls.clear()
        return found

    def _norms(self, calls: ExpertCalls, routing: Routing, num_left: int) -> OutputNorms:
        if routing.num_experts != calls.num_experts:
            raise UnknownExpertsError(
                f"the router states {calls.num_experts} experts and chooses among {routing.num_experts}"
            )
        num_rows = calls.check_pass()
        real = torch.ones(num_rows, dtype=torch.bool) if routing.mask is None else routing.mask.flatten().cpu()
        if len(real) != num_rows:
            raise UnknownExpertsError(f"the mask has {len(real)} rows and the router got {num_rows}")
        kept = real[: self._max_rows].nonzero().flatten()[:num_left]
        if not len(kept):
            return OutputNorms(None)
        totals = torch.zeros(calls.num_experts, dtype=torch.float64)
        for expert, output in calls.outputs(kept):
            norms = torch.linalg.vector_norm(output.float().flatten(1), dim=1)
            totals[expert] += norms.cpu().double().sum()
        return OutputNorms(totals, len(kept))


def _kind_of(experts: ExpertWeights, router: nn.Module) -> type[ExpertCalls]:
    if isinstance(experts.module, Experts):
        return OwnExperts
    if experts.members:
        return SeparateExperts
    if any(module is router for module in experts.module.modules()):
        raise UnknownExpertsError(
            f"the experts are parameters of {type(experts.module).__name__} itself, and cannot be called alone"
        )
    return FusedExperts
