"""Adapters for routers of other packages that do not return (logits, weights, indices).

Shapes: B samples, T tokens, N rows, E experts, S slots of an expert, K choices per row.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.routing.recognition.observed import Pass, UnknownDecisionError
from moe_heads.routing.recognition.scores import SIGMOID, SOFTMAX, ScoreRule, best_groups_only
from moe_heads.routing.routing import Routing

__all__ = [
    "dispatch_and_combine",
    "gates_with_capacity",
    "linear_gate",
    "one_hot_with_capacity",
    "sigmoid_of_top_logits",
    "slots",
    "softmax_of_all",
    "sorted_by_expert",
    "token_choice",
    "top_k_of_logits",
]


def one_hot_with_capacity(seen: Pass) -> Routing:
    """Switch Transformers: one-hot choices, zero beyond the capacity, (B, T, E), their weights, and the logits."""
    one_hot, weights, logits = seen.output
    choices = torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), -1).unsqueeze(-1)
    return SOFTMAX.routing(seen, logits, choices, weights)


def gates_with_capacity(seen: Pass) -> Routing:
    """NLLB-MoE: the weights of all experts, zero if not chosen or beyond the capacity, (N, E), and the logits."""
    _, gates, logits = seen.output
    return _from_gates(seen, SOFTMAX, logits, gates, 2)


def sigmoid_of_top_logits(seen: Pass) -> Routing:
    """Llama 4: the weights of all experts, zero if not chosen, (N, E), and the logits."""
    gates, logits = seen.output
    return _from_gates(seen, SIGMOID, logits, gates, int(seen.module.top_k))  # type: ignore[arg-type]


def sorted_by_expert(seen: Pass) -> Routing:
    """JetMoE: the choices sorted by expert as places in (N, K), their weights, the counts, and the logits."""
    places, _, sorted_weights, counts, logits = seen.output
    experts = torch.repeat_interleave(
        torch.arange(len(counts), device=places.device), torch.as_tensor(counts, device=places.device)
    )
    shape = len(logits), len(places) // max(len(logits), 1)
    choices = torch.empty_like(places).scatter(0, places, experts).view(shape)
    weights = torch.empty_like(sorted_weights).scatter(0, places, sorted_weights).view(shape)
    return SOFTMAX.routing(seen, logits, choices, weights)


def dispatch_and_combine(seen: Pass) -> Routing:
    """st-moe-pytorch: dispatch and combine tensors, (B, T, E, capacity). The choices beyond it are zero."""
    combine, gate, num_choices = seen.output[1], seen.module.to_gates, seen.module.top_n
    if combine.dim() != 4:
        raise UnknownDecisionError(f"its combine tensor has the shape {tuple(combine.shape)}, not (B, T, E, capacity)")
    logits = F.linear(seen.args[0], gate.weight, gate.bias)  # type: ignore[union-attr, arg-type]
    return _from_gates(seen, SOFTMAX, logits, combine.sum(-1), int(num_choices))  # type: ignore[arg-type]


def slots(seen: Pass) -> Routing:
    """soft-moe-pytorch: the layer has no router of its own, so its logits of the slots are computed again."""
    if seen.argument(2, "add_noise"):
        raise UnknownDecisionError("add_noise=True adds noise that its output does not show")
    layer: Any = seen.module
    x = seen.argument(0, "x")
    if x.dim() == 4:
        x = x.flatten(2).transpose(1, 2)  # images (B, D, H, W)
    elif x.dim() == 2:
        x = x.unsqueeze(1)
    logits = torch.einsum("btd,esd->btes", _plain(layer.norm, x), _plain(layer.slot_norm, layer.slot_embeds))
    mask = seen.argument(1, "mask")
    routing = Routing.from_probs(logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:]).sum(-1))
    return routing if mask is None else replace(routing, mask=mask.flatten())


def top_k_of_logits(num_choices: int, order: float | None) -> Callable[[Pass], Routing]:
    """Return an adapter for a gate that returns logits, of which its layer takes the top-k of the softmax.

    Args:
        num_choices: K.
        order: Order of the norm to which the weights are normalized. None if they are not.
    """

    def adapter(seen: Pass) -> Routing:
        probs = seen.output.softmax(-1)
        weights, choices = probs.topk(num_choices, dim=-1)
        if order is not None:
            weights = weights / torch.linalg.vector_norm(weights, order, dim=-1, keepdim=True)
        return Routing.from_probs(probs, choices, weights)

    return adapter


def softmax_of_all(num_choices: int, num_experts: int) -> Callable[[Pass], Routing]:
    """Return an adapter for the softmax over all experts inside a layer, after which the layer takes the top-k.

    With noise, the softmax is that of the noisy logits, which decide.
    """

    def adapter(seen: Pass) -> Routing:
        probs = seen.output
        if not isinstance(probs, Tensor) or probs.dim() != 2 or probs.shape[-1] != num_experts:
            raise UnknownDecisionError(f"its softmax is not over the {num_experts} experts")
        weights, choices = probs.topk(num_choices, dim=-1)
        return Routing.from_probs(probs, choices, weights / weights.sum(-1, keepdim=True))

    return adapter


def linear_gate(layer: nn.Module) -> Callable[[Pass], Routing]:
    """Return an adapter for the gates of a tutel layer, which return logits: (N, E).

    The layer takes the top-k of their softmax. A choice is dropped if its expert has as many choices of earlier rows
    (and of a higher rank) as its capacity allows.
    """

    def adapter(seen: Pass) -> Routing:
        gate: Any = seen.module
        logits = seen.output
        if gate.training and getattr(gate, "gate_noise", 0) > 0:
            raise UnknownDecisionError("gate_noise > 0 adds noise that its output does not show")
        if getattr(layer, "batch_prioritized_routing", False):
            raise UnknownDecisionError(
                "batch_prioritized_routing drops choices in an order that its output does not show"
            )
        probs, num_choices = logits.softmax(-1), int(gate.top_k)
        weights, choices = probs.topk(num_choices, dim=-1)
        if num_choices > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        factor = float(getattr(gate, "capacity_factor", 0.0))
        if factor < 0:
            raise UnknownDecisionError("a negative capacity_factor depends on all processes")
        if factor > 0:
            capacity = num_choices * int(factor * math.ceil(len(logits) / logits.shape[-1]))
            places = int(getattr(layer, "sharded_count", 1)) * int(getattr(layer, "a2a_ffn_overlap_degree", 1))
            capacity = math.ceil(capacity / places) * places
            # first the first choices of all rows, then their second ones
            ranked = F.one_hot(choices.t().flatten(), logits.shape[-1])
            place = ((ranked.cumsum(0) - 1) * ranked).sum(-1).view(num_choices, -1).t()
            choices = torch.where(place < capacity, choices, -1)
        return Routing.from_probs(probs, choices, weights)

    return adapter


def token_choice(seen: Pass) -> Routing:
    """torchtitan: weights and choices (N, K). The scores are computed again from its gate."""
    weights, choices = seen.output[:2]
    module, x = seen.module, seen.argument(0, "x", "x_TD")
    gate: Any = module.gate
    logits = F.linear(x, gate.weight, gate.bias).float()
    rule = SIGMOID if module.score_func == "sigmoid" else SOFTMAX
    if module.score_func not in ("sigmoid", "softmax"):
        raise UnknownDecisionError(f"its score_func is {module.score_func!r}")
    probs = rule.function(module, logits)
    bias = seen.argument(1, "expert_bias", "expert_bias_E")
    scores = probs if bias is None else probs + bias.detach()
    num_groups, num_best = (getattr(module, name, None) for name in ("num_expert_groups", "num_limited_groups"))
    if num_groups is not None and num_best is not None:
        scores = best_groups_only(scores, int(num_groups), int(num_best), "top2")
    choices, weights = (t.reshape(*probs.shape[:-1], -1) for t in (choices, weights))
    return Routing.from_probs(probs, choices, weights.float(), scores=scores)


def _from_gates(seen: Pass, rule: ScoreRule, logits: Tensor, gates: Tensor, num_choices: int) -> Routing:
    """Build a routing from the weights of all experts, (..., E): of the K largest, those of zero were dropped."""
    weights, choices = gates.topk(num_choices, dim=-1)
    return rule.routing(seen, logits, torch.where(weights > 0, choices, -1), weights)


def _plain(module: Any, x: Tensor) -> Tensor:
    """Call a submodule without its hooks, which belong to the pass of the user."""
    return type(module).forward(module, x)  # type: ignore[no-any-return]
