"""The common implementation of a sparse head: one module for each expert, and a boolean mask for its rows.

Claims that conditional routing brings no speed-up are based on it.
"""

import torch
from torch import Tensor, nn

from moe_heads import SparseMoE

__all__ = ["MaskLoop"]


class MaskLoop(nn.Module):
    """A loop over masks that computes the function of a trained `SparseMoE` in evaluation mode."""

    def __init__(self, head: SparseMoE) -> None:
        super().__init__()
        self.gate, self.k = head.router.get_submodule("gate"), int(head.k)
        experts = head.experts
        self.experts = nn.ModuleList()
        with torch.no_grad():
            for index in range(experts.num_experts):
                first = nn.Linear(experts.in_features, experts.width)
                last = nn.Linear(experts.width, experts.out_features)
                first.weight.copy_(experts.fc1.weight[index])
                first.bias.copy_(experts.fc1.bias_by_expert[index])
                last.weight.copy_(experts.fc2.weight[index])
                last.bias.copy_(experts.fc2.bias_by_expert[index])
                self.experts.append(nn.Sequential(first, nn.ReLU(), nn.Dropout(experts.dropout), last))
        self.num_classes = experts.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C)."""
        values, indices = self.gate(x).topk(self.k, dim=-1)
        gates = torch.zeros(len(x), len(self.experts), device=x.device).scatter(-1, indices, values.softmax(-1))
        output = x.new_zeros(len(x), self.num_classes)
        for index, expert in enumerate(self.experts):
            mask = gates[:, index] > 0
            if mask.any():
                output[mask] += gates[mask, index].unsqueeze(-1) * expert(x[mask])
        return output
