"""Balance losses over two processes: value and gradient of the global batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_heads import SparseMoE


def build() -> tuple[SparseMoE, torch.Tensor]:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, k=2, noisy=False, balance={"importance": 0.3, "switch": 0.2})
    return head.double().train(), torch.randn(12, 6).double()


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    head, x = build()
    model = torch.nn.parallel.DistributedDataParallel(_AuxLoss(head))
    loss = model(x[6 * rank : 6 * rank + 6])
    loss.backward()
    if rank == 0:
        torch.save((loss.detach(), head.router.gate.weight.grad), f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


class _AuxLoss(torch.nn.Module):
    def __init__(self, head: SparseMoE) -> None:
        super().__init__()
        self.gate = head.router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).aux_loss


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    loss, gradient = torch.load(tmp_path / "result.pt")
    head, x = build()
    expected = head(x, return_routing=True).aux_loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, head.router.gate.weight.grad)
