"""Experts with stacked parameters.

Shapes: N rows, D features, E experts, H expert width, C classes.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_shares

__all__ = ["Experts"]


class Experts(nn.Module):
    """E two-layer perceptrons D → H → ReLU → dropout → C with their parameters stacked along the first dimension.

    Stacked parameters get a dense gradient, which is zero for an expert without rows. So DistributedDataParallel finds
    a gradient for every parameter in every step. Each expert is initialized like a pair of `torch.nn.Linear`.
    `moe_heads.dispatch` decides which experts run on which rows.

    Args:
        num_experts: E.
        in_features: D.
        width: H.
        out_features: C.
        dropout: Probability after the ReLU.
    """

    num_filter_dims = 2
    """Number of leading dimensions that index filters, for filter normalization: expert and unit."""

    def __init__(self, num_experts: int, in_features: int, width: int, out_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_at_least_one(
            num_experts=num_experts, in_features=in_features, expert_width=width, num_classes=out_features
        )
        check_shares(dropout=dropout)
        self.num_experts = num_experts
        self.in_features, self.width, self.out_features = in_features, width, out_features
        self.dropout = dropout
        self.weight1 = nn.Parameter(torch.empty(num_experts, width, in_features))
        self.bias1 = nn.Parameter(torch.empty(num_experts, width))
        self.weight2 = nn.Parameter(torch.empty(num_experts, out_features, width))
        self.bias2 = nn.Parameter(torch.empty(num_experts, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sample every parameter from U(-1/√fan_in, 1/√fan_in), as `torch.nn.Linear` does."""
        for parameter, fan_in in (
            (self.weight1, self.in_features),
            (self.bias1, self.in_features),
            (self.weight2, self.width),
            (self.bias2, self.width),
        ):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the weights and biases: (E, H, D), (E, H), (E, C, H), (E, C)."""
        return self.weight1, self.bias1, self.weight2, self.bias2

    @property
    def parameters_per_expert(self) -> int:
        """Number of parameters of one expert."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    @property
    def flops_per_row(self) -> int:
        """Floating point operations of one expert on one row, two per multiply-add of its matrices."""
        return 2 * self.width * (self.in_features + self.out_features)

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply ReLU, and dropout in training, between the two layers. ``hidden`` may be overwritten."""
        hidden = hidden.relu_()
        return F.dropout(hidden, self.dropout) if self.training and self.dropout else hidden

    def each(self, slots: Tensor) -> Tensor:
        """Run every expert on its own slots.

        Args:
            slots: (B, E, S, D).

        Returns:
            (B, E, S, C).
        """
        hidden = self.activate(torch.einsum("besd,ehd->besh", slots, self.weight1) + self.bias1.unsqueeze(-2))
        return torch.einsum("besh,ech->besc", hidden, self.weight2) + self.bias2.unsqueeze(-2)

    def keep(self, experts: Sequence[int]) -> Self:
        """Return a copy with only these experts, for `moe_heads.ablate`."""
        # the meta device leaves the random number generator untouched
        with torch.device("meta"):
            kept = type(self)(len(experts), self.in_features, self.width, self.out_features, self.dropout)
        for name, parameter in self.named_parameters():
            setattr(kept, name, nn.Parameter(parameter.detach()[list(experts)], parameter.requires_grad))
        return kept.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes of the stacked experts."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, width={self.width}, "
            f"out_features={self.out_features}, dropout={self.dropout}"
        )
