"""The heads written once more, one sample and one expert at a time in float64: the oracle of every dispatch path."""

import torch
from torch import Tensor

from moe_heads import SoftMoE, SparseMoE
from moe_heads.experts import Experts


def expert_logits(experts: Experts, expert: int, row: Tensor) -> Tensor:
    weight1, bias1, weight2, bias2 = (stack[expert] for stack in experts.stacks())
    return weight2 @ (weight1 @ row + bias1).relu() + bias2


def sparse_row(head: SparseMoE, row: Tensor) -> Tensor:
    """Evaluation-mode logits of one row, (C,)."""
    z = (head.router.gate.weight @ row + head.router.gate.bias) / head.router.temperature
    chosen = sorted(range(head.num_experts), key=lambda e: -z[e].item())[: head.k]
    scores = torch.stack([z[e] for e in chosen]).exp()
    weights = scores / (z.exp().sum() if head.k == 1 else scores.sum())
    return sum(weight * expert_logits(head.experts, e, row) for weight, e in zip(weights, chosen, strict=True))


def sparse_loop(head: SparseMoE, x: Tensor) -> Tensor:
    return torch.stack([sparse_row(head, row) for row in x])


def gated_loop(head: SoftMoE | SparseMoE, x: Tensor, gates: Tensor) -> Tensor:
    """Sum of the experts weighted by given gates, row by row and expert by expert, and of the shared experts."""
    logits = []
    for row, weights in zip(x, gates, strict=True):
        total = x.new_zeros(head.num_classes)
        for expert, weight in enumerate(weights):
            if weight != 0:
                total = total + weight * expert_logits(head.experts, expert, row)
        if getattr(head, "shared", None) is not None:
            for expert in range(head.shared.num_experts):
                total = total + expert_logits(head.shared, expert, row)
        logits.append(total)
    return torch.stack(logits)


def soft_loop(head: SoftMoE, x: Tensor) -> Tensor:
    """Softmax mixture of all experts for pooled features."""
    logits = []
    for row in x:
        gate = head.router.gate.weight @ row + head.router.gate.bias
        scores = (gate / head.router.temperature).exp()
        mixed = sum(scores[e] / scores.sum() * expert_logits(head.experts, e, row) for e in range(head.num_experts))
        logits.append(mixed)
    return torch.stack(logits)


def soft_token_loop(head: SoftMoE, x: Tensor) -> Tensor:
    """Soft MoE with slots for one batch of tokens (B, T, D), slot by slot and token by token."""
    num_slots = head.num_experts * head.slots_per_expert
    results = []
    for tokens in x:
        scores = torch.stack([head.router.gate.weight @ t + head.router.gate.bias for t in tokens]).exp()
        slot_outputs = []
        for slot in range(num_slots):
            weights = scores[:, slot] / scores[:, slot].sum()
            slot_input = sum(w * t for w, t in zip(weights, tokens, strict=True))
            slot_outputs.append(expert_logits(head.experts, slot // head.slots_per_expert, slot_input))
        per_token = []
        for token_scores in scores:
            weights = token_scores / token_scores.sum()
            per_token.append(sum(w * y for w, y in zip(weights, slot_outputs, strict=True)))
        results.append(torch.stack(per_token).mean(0))
    return torch.stack(results)
