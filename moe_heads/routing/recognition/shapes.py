"""Routers that are recognized by the shapes of what they return: choices (N, K) and their weights.

Shapes: N rows, or B samples of T tokens, E experts, K choices per row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.routing.recognition.observed import Pass
from moe_heads.routing.routing import Routing

__all__ = ["Decisions", "decisions_in", "routing_by_shape"]

# Attributes in which routers keep E.
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "num_global_experts")

Decisions = tuple[Tensor | None, Tensor, Tensor, int]
"""Logits (..., E) or None, choices (..., K), weights (..., K), and E."""


def decisions_in(module: nn.Module, output: Any) -> Decisions | None:
    """Find logits, choices, weights and E in the output of a router, or return None.

    The output is a tuple with one tensor of integers, the choices, and floating point weights of the same shape. The
    number of experts is the last dimension of another tensor over the same rows (logits, or a map of the choices), the
    length of a vector (counts), or an attribute of the router.
    """
    if not isinstance(output, (tuple, list)):
        return None
    tensors = [value for value in output if isinstance(value, Tensor)]
    whole = [t for t in tensors if t.dim() in (2, 3) and not t.is_floating_point() and t.dtype != torch.bool]
    if len(whole) != 1:
        return None
    choices = whole[0]
    floating = [t for t in tensors if t.is_floating_point()]
    weights = [t for t in floating if t.shape == choices.shape]
    wide = [t for t in tensors if t is not choices and t.dim() == choices.dim() and t.shape[:-1] == choices.shape[:-1]]
    others = [t for t in wide if t.shape != choices.shape and t.shape[-1] > choices.shape[-1]]
    logits: Tensor | None = None
    if len(weights) == 2 and tensors[:2] == weights:
        # k = E: the order of (logits, weights, choices) tells them apart
        logits, num_experts = weights[0], choices.shape[-1]
    elif len(weights) != 1:
        return None
    elif others:
        logits = others[0] if others[0].is_floating_point() else None
        num_experts = others[0].shape[-1]
    else:
        vectors = [t for t in tensors if t.dim() == 1 and len(t) >= choices.shape[-1]]
        known = [getattr(module, name, None) for name in _NUM_EXPERTS]
        found = [n for n in known if isinstance(n, int) and n >= choices.shape[-1]] + [len(t) for t in vectors]
        if not found:
            return None
        num_experts = found[0]
    return logits, choices, weights[-1], num_experts


def routing_by_shape(seen: Pass) -> Routing | None:
    """Return the routing of a pass with unknown entropy and margin, or None if its output has another form."""
    found = decisions_in(seen.module, seen.output)
    if found is None:
        return None
    _, choices, weights, num_experts = found
    return Routing.from_choices(choices, num_experts, weights.float().abs())
