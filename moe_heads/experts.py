"""Experts as stacked parameters, and the ways to run them.

Shapes: N rows, D features, E experts, H expert width, C classes, K chosen experts a row.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_dropout

__all__ = ["Experts"]


class Experts(nn.Module):
    """E two-layer perceptrons D → H → ReLU → dropout → C with their parameters stacked along the first dimension.

    Stacked parameters get a dense gradient, zero for an expert that no row reached, so that DistributedDataParallel
    sees every parameter in every step. Each expert starts like a pair of `torch.nn.Linear`.

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
        check_dropout(dropout)
        self.num_experts, self.in_features, self.width, self.out_features = (
            num_experts,
            in_features,
            width,
            out_features,
        )
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

    @property
    def parameters_per_expert(self) -> int:
        """Parameters of one expert."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    def mix_all(self, x: Tensor, gates: Tensor) -> Tensor:
        """Weighted sum of all experts as two matrix products: static shapes, no branch, no host synchronisation.

        The gates scale the hidden units, so that the second product sums over experts and units at once.

        Args:
            x: Rows, (N, D).
            gates: Mixing weights, (N, E).

        Returns:
            Logits, (N, C).
        """
        hidden = F.linear(x, self.weight1.flatten(0, 1), self.bias1.flatten())
        hidden = F.dropout(F.relu(hidden), self.dropout, self.training)
        gates = gates.to(hidden.dtype)
        weighted = hidden.unflatten(-1, (self.num_experts, self.width)) * gates.unsqueeze(-1)
        second = self.weight2.transpose(1, 2).flatten(0, 1)
        logits: Tensor = weighted.flatten(-2) @ second + gates @ self.bias2.to(gates.dtype)
        return logits

    def mix_selected(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, computed for the rows that chose them only.

        Rows are sorted by expert, each expert runs once on its segment, and the inverse permutation brings the results
        back. The segment lengths are read by the host: one synchronisation on a GPU.

        Args:
            x: Rows, (N, D).
            indices: Chosen experts, (N, K).
            weights: Their mixing weights, (N, K).

        Returns:
            Logits, (N, C).
        """
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        lengths = torch.bincount(flat, minlength=self.num_experts).tolist()
        segments = x[order // indices.shape[-1]].split(lengths)
        # unbound once: indexing the stacked weights in a loop costs O(E²) in backward
        stacked = zip(
            *(parameter.unbind() for parameter in (self.weight1, self.bias1, self.weight2, self.bias2)), strict=True
        )
        outputs = torch.cat(
            [self._expert(rows, *expert) for rows, expert in zip(segments, stacked, strict=True) if len(rows)]
            or [x.new_zeros(0, self.out_features)]
        )
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        chosen = outputs[inverse].unflatten(0, indices.shape)
        logits: Tensor = (chosen * weights.to(chosen.dtype).unsqueeze(-1)).sum(-2)
        return logits

    def each(self, slots: Tensor) -> Tensor:
        """Every expert on its own slots.

        Args:
            slots: (B, E, S, D).

        Returns:
            (B, E, S, C).
        """
        hidden = torch.einsum("besd,ehd->besh", slots, self.weight1) + self.bias1.unsqueeze(-2)
        hidden = F.dropout(F.relu(hidden), self.dropout, self.training)
        return torch.einsum("besh,ech->besc", hidden, self.weight2) + self.bias2.unsqueeze(-2)

    def _expert(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(F.linear(x, weight1, bias1)), self.dropout, self.training)
        return F.linear(hidden, weight2, bias2)

    def extra_repr(self) -> str:
        """Sizes of the stacked experts."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, width={self.width}, "
            f"out_features={self.out_features}, dropout={self.dropout}"
        )
