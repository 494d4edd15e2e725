"""Balance losses over two processes: value and gradient of the global batch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_heads import SparseMoE
from tests.support.processes import run_on_ranks


def build() -> tuple[SparseMoE, torch.Tensor]:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, k=2, noisy=False, balance={"importance": 0.3, "switch": 0.2})
    return head.double().train(), torch.randn(12, 6).double()


def one_rank(rank: int) -> tuple[Tensor, Any]:
    head, x = build()
    model = torch.nn.parallel.DistributedDataParallel(_AuxLoss(head))
    loss = model(x[6 * rank : 6 * rank + 6])
    loss.backward()
    return loss.detach(), head.router.gate.weight.grad


class _AuxLoss(torch.nn.Module):
    def __init__(self, head: SparseMoE) -> None:
        super().__init__()
        self.gate = head.router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).aux_loss


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    loss, gradient = run_on_ranks(one_rank, tmp_path)[0]
    head, x = build()
    expected = head(x, return_routing=True).aux_loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, head.router.gate.weight.grad)
