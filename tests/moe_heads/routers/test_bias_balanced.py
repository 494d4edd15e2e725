"""The bias that balances without a loss."""

from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from moe_heads import SparseMoE
from moe_heads.routers import BiasBalancedRouter
from tests.support.processes import run_on_ranks


def test_selection_uses_the_bias_and_the_weights_do_not() -> None:
    router = BiasBalancedRouter(4, 5, k=2).eval()
    router.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0, 8.0]))
    x = torch.randn(7, 4)
    routing, affinity = router(x), router.gate(x).sigmoid()
    assert routing.indices.sort(-1).values.tolist() == [[1, 4]] * 7
    chosen = affinity.gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))


def test_the_bias_moves_by_the_sign_of_the_missing_load_one_pass_later() -> None:
    router = BiasBalancedRouter(3, 3, k=1, update_rate=0.25).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
        router.gate.bias.zero_()
    x = torch.eye(3)[[0, 0, 0, 0, 1, 1]]  # counts 4, 2, 0: mean 2
    router(x)
    assert router.bias.tolist() == [0, 0, 0]
    assert router.pending_counts.tolist() == [4, 2, 0]
    router(x)
    assert router.bias.tolist() == [-0.25, 0.0, 0.25]
    router.eval()(x)
    assert router.bias.tolist() == [-0.25, 0.0, 0.25]


def test_it_balances_a_collapsed_gate() -> None:
    router = BiasBalancedRouter(8, 4, k=1, update_rate=0.01).train()
    with torch.no_grad():
        router.gate.weight.mul_(0.5)
        router.gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    x = torch.randn(400, 8)
    assert router(x).stats().load.max() > 0.95
    for _ in range(300):
        routing = router(x)
    assert routing.stats().load.max() < 0.35


def test_gradient_checkpointing_counts_a_batch_once_and_changes_no_gradient() -> None:
    torch.manual_seed(0)
    options = {"num_experts": 4, "expert_width": 5, "dropout": 0.0}
    head = SparseMoE(6, 3, **options, router=BiasBalancedRouter(6, 4, update_rate=0.1))
    plain = SparseMoE(6, 3, **options, router=BiasBalancedRouter(6, 4, update_rate=0.1))
    plain.load_state_dict(head.state_dict())
    for _ in range(3):
        x = torch.randn(30, 6)
        checkpoint(head, x, use_reentrant=False).square().sum().backward()
        plain(x).square().sum().backward()
    assert torch.equal(head.router.bias, plain.router.bias)
    for mine, theirs in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_bias_and_counts_are_saved() -> None:
    router, other = BiasBalancedRouter(4, 3).train(), BiasBalancedRouter(4, 3)
    for _ in range(2):
        router(torch.randn(20, 4))
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.bias, router.bias)
    assert torch.equal(other.pending_counts, router.pending_counts)


def one_rank(rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, router=BiasBalancedRouter(6, 4))
    model = torch.nn.parallel.DistributedDataParallel(head)
    x = torch.randn(5, 24, 6)
    for batch in x:
        model(batch[12 * rank : 12 * rank + 12]).sum().backward()
    return head.router.bias


def test_two_ranks_move_the_bias_as_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, router=BiasBalancedRouter(6, 4))
    for batch in torch.randn(5, 24, 6):
        head(batch)
    first, second = run_on_ranks(one_rank, tmp_path)
    assert torch.equal(first, head.router.bias)
    assert torch.equal(second, head.router.bias)
