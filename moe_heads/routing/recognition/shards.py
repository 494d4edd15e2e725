"""Routers of models that are split over processes: what this process knows of their decisions.

Shapes: N rows, E experts, K choices per row.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_heads.modes import can_read_values
from moe_heads.routing.recognition.observed import Pass, UnknownDecisionError

__all__ = ["experts_of_this_process", "has_processes", "on_this_process"]


def on_this_process(seen: Pass) -> tuple[Pass, str]:
    """Replace distributed tensors by their part in this process.

    Returns:
        The pass, and why its rows are only those of this process. The reason is empty if the tensors are plain or whole
        in every process.

    Raises:
        UnknownDecisionError: If a tensor is split by experts, or holds summands.
    """
    outputs = seen.output if isinstance(seen.output, (tuple, list)) else (seen.output,)
    if not any(map(_is_distributed, (*outputs, *seen.args, *seen.kwargs.values()))):
        return seen, ""
    reasons: list[str] = []

    def local(value: Any) -> Any:
        if not _is_distributed(value):
            return value
        for placement in value.placements:
            if placement.is_shard(value.dim() - 1) or placement.is_partial():
                raise UnknownDecisionError(f"its output is distributed as {value.placements}, which splits the experts")
            if placement.is_shard():
                reasons.append(f"its tokens are distributed as {value.placements}")
        return value.to_local()

    output, args, kwargs = (tree_map(local, part) for part in (seen.output, seen.args, seen.kwargs))
    return Pass(seen.module, args, kwargs, output), reasons[0] if reasons else ""


def experts_of_this_process(
    experts: nn.Module | None, choices: Tensor, weights: Tensor, num_experts: int
) -> int | None:
    """Return the number of experts in this process if the router numbers these only, or None.

    Such a router gives a choice of an expert of another process the number of the experts here, and no weight.

    Args:
        experts: Module of the experts of this process, with their number as ``num_experts``.
        choices: Choices, (N, K).
        weights: Their weights, (N, K).
        num_experts: E, of all processes.
    """
    num_here = getattr(experts, "num_experts", None)
    if not isinstance(num_here, int) or num_here >= num_experts or not choices.numel():
        return None
    if not can_read_values(choices):
        return None
    is_elsewhere = (choices == num_here) & (weights == 0)
    return num_here if bool(is_elsewhere.any()) and int(choices.max()) <= num_here else None


def has_processes() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_distributed(value: Any) -> bool:
    # by its attributes: torch.distributed.tensor takes a while to import
    return isinstance(value, Tensor) and hasattr(value, "placements") and hasattr(value, "to_local")
