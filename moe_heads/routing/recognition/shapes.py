"""Routers that are recognized by the shapes of what they return: choices (N, K) and their weights.

Shapes: N rows, or B samples of T tokens, E experts, K choices per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_heads.modes import can_read_without_sync
from moe_heads.routing.recognition.observed import Pass
from moe_heads.routing.routing import Routing

__all__ = ["Decisions", "decisions_in", "routing_by_shape", "stated_num_experts"]

# Attributes in which routers keep E.
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "n_experts", "num_global_experts", "num_local_experts")


class Decisions(NamedTuple):
    """Decisions in the output of a router.

    Attributes:
        logits: Logits of all experts, (..., E), or None.
        choices: Choices, (..., K).
        weights: Their weights, (..., K).
        num_experts: E.
    """

    logits: Tensor | None
    choices: Tensor
    weights: Tensor
    num_experts: int


def decisions_in(seen: Pass) -> Decisions | None:
    """Find logits, choices, weights and E in the output of a router, or return None.

    The output is a tuple with one tensor of integers, the choices, and floating point weights of the same shape next to
    it. The number of experts is an attribute of the router, or the last dimension of another tensor over the same rows
    (logits, or a map of the choices) that is not as wide as the input, or the length of a vector (counts) that has not
    one number for each row.
    """
    if not isinstance(seen.output, (tuple, list)):
        return None
    tensors = [value for value in seen.output if isinstance(value, Tensor)]
    whole = [t for t in tensors if t.dim() in (2, 3) and not t.is_floating_point() and t.dtype != torch.bool]
    if len(whole) != 1:
        return None
    choices = whole[0]
    place = next(number for number, tensor in enumerate(tensors) if tensor is choices)
    # the weights stand right before the choices, or right after them
    neighbors = [tensors[number] for number in (place - 1, place + 1) if 0 <= number < len(tensors)]
    weights = next((t for t in neighbors if t.is_floating_point() and t.shape == choices.shape), None)
    if weights is None:
        return None
    others = [t for t in tensors if t is not choices and t is not weights and t.shape[:-1] == choices.shape[:-1]]
    wide = [t for t in others if t.shape[-1] >= choices.shape[-1]]
    num_experts = _num_experts(seen, choices, wide, tensors)
    if num_experts is None:
        return None
    logits = next((t for t in wide if t.is_floating_point() and t.shape[-1] == num_experts), None)
    return Decisions(logits, choices, weights, num_experts)


def _num_experts(seen: Pass, choices: Tensor, wide: list[Tensor], tensors: list[Tensor]) -> int | None:
    num_choices, num_rows = choices.shape[-1], choices.shape[:-1].numel()
    found = [n for n in stated_num_experts(seen.module) if n >= num_choices]
    x = seen.argument(0, "hidden_states", "x", "input")
    width = x.shape[-1] if isinstance(x, Tensor) and x.dim() > 0 else None
    found += [t.shape[-1] for t in wide if t.shape[-1] != width]
    found += [len(t) for t in tensors if t.dim() == 1 and len(t) >= num_choices and len(t) != num_rows]
    return found[0] if found else None


def stated_num_experts(router: nn.Module) -> list[int]:
    """Return the numbers of experts that a router states in its attributes."""
    stated = [getattr(router, name, None) for name in _NUM_EXPERTS]
    return [number for number in stated if isinstance(number, int) and not isinstance(number, bool) and number > 0]


def routing_by_shape(found: Decisions, with_weights: bool) -> Routing | None:
    """Return the routing of a pass with unknown entropy and margin, or None if no row has choices of experts.

    A negative index, E, or a weight of zero is a dropped choice. A row with an index above E or with a repeated expert
    counts as a row with non-finite logits.

    Args:
        found: The decisions.
        with_weights: Whether the weights are shares. Otherwise all choices count alike.
    """
    num_experts = found.num_experts
    choices = torch.where(found.choices < 0, num_experts, found.choices)
    ordered = choices.sort(-1).values
    is_repeated = ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] < num_experts)).any(-1, keepdim=True)
    is_wrong = is_repeated | (choices > num_experts).any(-1, keepdim=True)
    if can_read_without_sync(is_wrong) and is_wrong.numel() and bool(is_wrong.all()):
        return None
    equal = torch.full_like(choices, 1 / choices.shape[-1], dtype=torch.float32)
    weights = found.weights.float() if with_weights else equal
    # the choices of a wrong row are replaced by none, and its weights by nan
    choices, weights = choices.masked_fill(is_wrong, num_experts), weights.masked_fill(is_wrong, torch.nan)
    return Routing.from_choices(choices, num_experts, weights)
