"""Padded tokens in the analysis of the experts."""

import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis.expert_utilization.function import expert_utilization


def test_padding_counts_nowhere_in_the_analysis() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = SparseMoE(4, 3, num_experts=4, expert_width=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x, mask=x.isfinite().all(-1))

    model = Masked().eval()
    short, labels = torch.randn(20, 5, 4), torch.arange(20) % 3
    x = torch.cat([short, torch.full((20, 3, 4), torch.nan)], 1)
    found = expert_utilization(model, [(x, labels)], num_permutations=0).heads["head"]
    expected = expert_utilization(model, [(short, labels)], num_permutations=0).heads["head"]
    assert found.num_rows == expected.num_rows == 100 and found.num_nonfinite == 0
    for name in ("load", "importance", "coactivation", "class_map", "class_counts"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for name in ("entropy", "margin", "effective_experts_per_row", "mutual_information"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
