"""Routers whose decisions are known: the input's columns are the logits, plus one parameter that shifts them."""

import torch
from torch import Tensor, nn

from moe_heads import Router, Routing


class HandRouter(Router):
    """Routes row x with the logits x + shift; soft, or to its ``k`` largest."""

    def __init__(self, num_experts: int, k: int | None = None) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.shift = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        logits = x + self.shift
        probs = logits.softmax(-1)
        if self.k is None:
            return Routing(logits=logits, probs=probs, rows_per_sample=rows_per_sample, mask=mask)
        top = logits.topk(self.k, dim=-1)
        weights = probs.gather(-1, top.indices) if self.k == 1 else top.values.softmax(-1)
        return Routing(
            logits=logits,
            probs=probs,
            indices=top.indices,
            weights=weights,
            rows_per_sample=rows_per_sample,
            mask=mask,
        )


class HandHead(nn.Module):
    """Owns a `HandRouter`; its output is the gates (N, E). Tokens (B, T, E) are routed one by one."""

    def __init__(self, num_experts: int, k: int | None = None) -> None:
        super().__init__()
        self.router = HandRouter(num_experts, k)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.router(x.flatten(0, 1), rows_per_sample=x.shape[1]).gates
        return self.router(x).gates


class HandModel(nn.Module):
    """A model with one `HandHead` called "head"."""

    def __init__(self, num_experts: int, k: int | None = None) -> None:
        super().__init__()
        self.head = HandHead(num_experts, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
