"""Routers of models that are split over processes: what this process knows of their decisions.

Shapes: N rows, E experts, K choices per row.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_heads.routing.recognition.observed import Pass, UnknownDecisionError

__all__ = ["choices_of_this_process", "on_this_process"]


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


def choices_of_this_process(
    experts: nn.Module | None, choices: Tensor, weights: Tensor, num_experts: int
) -> tuple[Tensor, int] | None:
    """Return the choices among the experts of this process, and their number, if the router numbers these only.

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
    is_elsewhere = (choices == num_here) & (weights == 0)
    if not bool(is_elsewhere.any()) or int(choices.max()) > num_here:
        return None
    return choices.masked_fill(is_elsewhere, -1), num_here


def _is_distributed(value: Any) -> bool:
    # by its attributes: torch.distributed.tensor takes a while to import
    return isinstance(value, Tensor) and hasattr(value, "placements") and hasattr(value, "to_local")
