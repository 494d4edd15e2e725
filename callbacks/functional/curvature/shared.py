"""The Hessian over the samples of several processes."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.curvature.operator import HessianOperator

__all__ = ["shared_hessian"]

T = TypeVar("T")


def shared_hessian(
    ranks: Ranks,
    lead: Callable[[HessianOperator], T],
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    graph_memory: int | None = None,
    monitor: Monitor | None = None,
) -> T:
    """Run ``lead(operator)`` on rank zero, with the Hessian of the mean loss over the samples of all ranks.

    Args:
        ranks: The processes.
        lead: The algorithm.
        model: The model, the same on all ranks.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: The samples of this rank.
        graph_memory: See `HessianOperator`.
        monitor: See `HessianOperator`.

    Returns:
        What ``lead`` returned, on every rank.
    """
    with ranks.together():
        # only rank zero looks at the clock
        watched = monitor if ranks.leads else None
        operator = HessianOperator(model, loss_fn, batches, graph_memory=graph_memory, monitor=watched)
    num_samples = ranks.sum(operator.num_samples)

    def with_total(total: Callable[[torch.Tensor], torch.Tensor]) -> T:
        operator.over_ranks(total, num_samples)
        return lead(operator)

    vector = torch.zeros(operator.num_parameters, dtype=operator.dtype, device=operator.device)
    try:
        return ranks.led(operator.sample_sum, with_total, vector, vector)
    finally:
        operator.release()  # whoever still holds what was found must not hold the graphs
