"""Path that runs each chosen expert once, on its rows, without arithmetic or memory traffic for the other experts.

The host reads the lengths of the segments, so the path is for eager mode. On a GPU this costs a synchronization.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.dispatch.assignments import Assignments, assignments, combine
from moe_heads.experts import Experts
from moe_heads.precision import compute_dtype
from moe_heads.routing import Routing

__all__ = ["mix_ragged"]

_MANY_ROWS = 1024


def mix_ragged(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Compute the weighted sum of the chosen experts (N, C) for the rows x (N, D)."""
    stacks = _by_expert(experts)
    if x.shape[0] == 1 and routing.indices is not None and routing.weights is not None:
        # one row needs no sorting and no scattering
        outputs = torch.cat([_run(experts, stacks, expert, x) for expert in routing.indices.tolist()[0]])
        return (routing.weights @ outputs.to(routing.weights.dtype)).to(outputs.dtype)
    chosen = assignments(routing)
    lengths = torch.bincount(chosen.experts, minlength=experts.num_experts).tolist()
    chosen_experts = [expert for expert, length in enumerate(lengths) if length]
    each = [
        _run(experts, stacks, expert, rows)
        for expert, rows in zip(chosen_experts, _segments(x, chosen, lengths), strict=True)
    ]
    return combine(
        torch.cat(each or [x.new_zeros(0, experts.out_features, dtype=compute_dtype(x))]), chosen, x.shape[0]
    )


def _segments(x: Tensor, chosen: Assignments, lengths: list[int]) -> Iterable[Tensor]:
    """Return the rows of each chosen expert."""
    sizes = [length for length in lengths if length]
    if torch.is_grad_enabled() or len(chosen.rows) < _MANY_ROWS:
        rows: tuple[Tensor, ...] = x.index_select(0, chosen.rows).split(sizes)
        return rows
    # one segment at a time, so that it is still in the cache when its expert runs
    return (x.index_select(0, of_expert) for of_expert in chosen.rows.split(sizes))


Stack = Tensor | tuple[Tensor, ...]


def _by_expert(experts: Experts) -> tuple[Stack, Stack, Stack, Stack]:
    """Return the stacked parameters in a form to be indexed by expert."""
    stacks = experts.stacks()
    if not torch.is_grad_enabled():
        return stacks
    # indexing the stacked weights in a loop would cost O(E²) in backward
    weight1, bias1, weight2, bias2 = (stack.unbind() if stack.requires_grad else stack for stack in stacks)
    return weight1, bias1, weight2, bias2


def _run(experts: Experts, stacks: tuple[Stack, Stack, Stack, Stack], expert: int, rows: Tensor) -> Tensor:
    weight1, bias1, weight2, bias2 = stacks
    hidden = experts.activate(F.linear(rows, weight1[expert], bias1[expert]))
    return F.linear(hidden, weight2[expert], bias2[expert])
