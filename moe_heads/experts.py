"""Experts as stacked parameters.

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

    Stacked parameters get a dense gradient, zero for an expert that no row reached, so that DistributedDataParallel
    sees every parameter in every step. Each expert starts like a pair of `torch.nn.Linear`. Which of them run on
    which rows is the matter of `moe_heads.dispatch`.

    Args:
        num_experts: E.
        in_features: D.
        width: H.
        out_features: C.
        dropout: Probability after the ReLU.
    """

    num_filter_dims = 2
    """Leading dimensions that count filters, for `callbacks.functional.filter_normalized`: expert and unit."""

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
        """Draw every parameter from U(-1/√fan_in, 1/√fan_in), as `torch.nn.Linear` does."""
        for parameter, fan_in in (
            (self.weight1, self.in_features),
            (self.bias1, self.in_features),
            (self.weight2, self.width),
            (self.bias2, self.width),
        ):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and biases: (E, H, D), (E, H), (E, C, H), (E, C)."""
        return self.weight1, self.bias1, self.weight2, self.bias2

    @property
    def parameters_per_expert(self) -> int:
        """Parameters of one expert."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    @property
    def flops_per_row(self) -> int:
        """Floating point operations of one expert on one row: two for each multiply-add of its matrices."""
        return 2 * self.width * (self.in_features + self.out_features)

    def activate(self, hidden: Tensor) -> Tensor:
        """ReLU, and dropout in training, between the two layers; ``hidden`` may be overwritten."""
        hidden = hidden.relu_()
        return F.dropout(hidden, self.dropout) if self.training and self.dropout else hidden

    def each(self, slots: Tensor) -> Tensor:
        """Every expert on its own slots.

        Args:
            slots: (B, E, S, D).

        Returns:
            (B, E, S, C).
        """
        hidden = self.activate(torch.einsum("besd,ehd->besh", slots, self.weight1) + self.bias1.unsqueeze(-2))
        return torch.einsum("besh,ech->besc", hidden, self.weight2) + self.bias2.unsqueeze(-2)

    def keep(self, experts: Sequence[int]) -> Self:
        """A copy with these experts only, for `moe_heads.ablate`."""
        # on the meta device nothing is drawn from the random number generator
        with torch.device("meta"):
            kept = type(self)(len(experts), self.in_features, self.width, self.out_features, self.dropout)
        for name, parameter in self.named_parameters():
            setattr(kept, name, nn.Parameter(parameter.detach()[list(experts)], parameter.requires_grad))
        return kept.train(self.training)

    def extra_repr(self) -> str:
        """Sizes of the stacked experts."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, width={self.width}, "
            f"out_features={self.out_features}, dropout={self.dropout}"
        )
