"""Balancing by a bias without a loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_heads import SparseMoE
from moe_heads.routers import BiasBalancedRouter
from tests.support.processes import run_on_ranks


def identity_router(**options: object) -> BiasBalancedRouter:
    """Logits equal to the input."""
    router = BiasBalancedRouter(3, 3, k=1, **options).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
        router.gate.bias.zero_()
    return router


def optimizer_step(router: BiasBalancedRouter) -> None:
    """A change of the gate, too small to change a choice."""
    with torch.no_grad():
        router.gate.bias.add_(1e-6)


def test_selection_uses_the_bias_and_the_weights_do_not() -> None:
    router = BiasBalancedRouter(4, 5, k=2, update_rate=1.0).eval()
    router.bias_steps.copy_(torch.tensor([0, 9, 0, 0, 8]))
    x = torch.randn(7, 4)
    routing, affinity = router(x), router.gate(x).sigmoid()
    assert routing.indices.sort(-1).values.tolist() == [[1, 4]] * 7
    chosen = affinity.gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.probs, router.gate(x).softmax(-1))
    torch.testing.assert_close(routing.margin, 8 + affinity[:, 4] - affinity[:, [0, 2, 3]].amax(-1))


def test_one_chosen_expert_has_its_own_affinity_as_weight() -> None:
    router = BiasBalancedRouter(4, 5, k=1).eval()
    x = torch.randn(7, 4)
    torch.testing.assert_close(router(x).weights.squeeze(-1), router.gate(x).sigmoid().amax(-1))


def test_weights_of_vanishing_affinities_are_numbers() -> None:
    router = BiasBalancedRouter(4, 5, k=2).eval()
    with torch.no_grad():
        router.gate.bias.fill_(-200.0)
    torch.testing.assert_close(router(torch.zeros(3, 4)).weights, torch.full((3, 2), 0.5))


def test_the_bias_moves_by_the_sign_of_the_missing_load_once_an_optimizer_step() -> None:
    router = identity_router(update_rate=0.25)
    x = torch.eye(3)[[0, 0, 0, 0, 1, 1]]  # counts 4, 2, 0: mean 2
    x_with_nan = torch.cat((x, torch.full((1, 3), float("nan"))))
    for _ in range(3):
        router(x_with_nan)
        assert router.selection_bias.tolist() == [0, 0, 0]
        assert router.pending_counts.tolist() == [4, 2, 0]
    optimizer_step(router)
    for _ in range(3):
        router(x)
        assert router.selection_bias.tolist() == [-0.25, 0.0, 0.25]
    optimizer_step(router)
    router.eval()(x)
    assert router.selection_bias.tolist() == [-0.25, 0.0, 0.25]


def test_the_mean_decides_and_not_the_median() -> None:
    router = identity_router(update_rate=1.0)
    router(torch.eye(3)[[0] * 7 + [1] * 2])  # counts 7, 2, 0: mean 3, median 2
    optimizer_step(router)
    router(torch.eye(3))
    assert router.bias_steps.tolist() == [-1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_balances_a_collapsed_gate_in_every_precision(dtype: torch.dtype) -> None:
    head = SparseMoE(8, 2, num_experts=4, expert_width=4, router=BiasBalancedRouter(8, 4, k=1)).to(dtype)
    router = head.router
    with torch.no_grad():
        router.gate.weight.mul_(0.5)
        router.gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
        router.seen_weight.zero_()
    x = torch.randn(400, 8).to(dtype)
    assert router(x).stats().load.max() > 0.95
    for _ in range(900):
        router.seen_weight.zero_()  # as after an optimizer step
        routing = router(x)
    assert routing.stats().load.max() < 0.35


RUNS: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "checkpoint": lambda head: lambda x: checkpoint(head, x, use_reentrant=False),
    "reentrant": lambda head: lambda x: checkpoint(head, x, use_reentrant=True),
    "compile": lambda head: torch.compile(head, backend="aot_eager", fullgraph=True),
    "checkpoint of compile": lambda head: partial(
        checkpoint, torch.compile(head, backend="aot_eager"), use_reentrant=False
    ),
    "compile of checkpoint": lambda head: torch.compile(
        lambda x: checkpoint(head, x, use_reentrant=False), backend="aot_eager"
    ),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_running_a_pass_twice_changes_neither_gradient_nor_bias(name: str) -> None:
    torch.compiler.reset()
    results = []
    for build in (RUNS[name], lambda head: head):
        torch.manual_seed(0)
        router = BiasBalancedRouter(6, 4, update_rate=0.1)
        head = SparseMoE(6, 3, num_experts=4, expert_width=5, dropout=0.0, dispatch="all", router=router)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        run = build(head)
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.randn(30, 6, requires_grad=True)
            run(x).square().sum().backward()
            optimizer.step()
        results.append([*head.parameters(), router.bias_steps.float(), router.pending_counts.float()])
        assert router.bias_steps.abs().max() >= 2
    torch.testing.assert_close(*results)


def test_transforms_find_a_pure_function_in_training() -> None:
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, dropout=0.0, router=BiasBalancedRouter(6, 4)).train()
    parameters = {name: p.detach() for name, p in head.named_parameters()}
    x = torch.randn(5, 6)

    def loss(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, values, (row.unsqueeze(0),)).square().sum()

    torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.func.jvp(lambda values: loss(values, x[0]), (parameters,), (parameters,))
    assert head.router.pending_counts.sum() == 0


def test_bias_and_counts_are_saved_and_an_interrupted_run_goes_on_as_it_was() -> None:
    x = torch.randn(40, 20, 4)
    states = []
    for interrupted in (False, True):
        torch.manual_seed(1)
        router = BiasBalancedRouter(4, 3).train()
        for step, batch in enumerate(x):
            if interrupted and step == 20:
                state = router.state_dict()
                router = BiasBalancedRouter(4, 3).train()
                router.load_state_dict(state)
            router(batch)
            optimizer_step(router)
        states.append(router.state_dict())
    assert set(states[0]) == {"gate.weight", "gate.bias", "bias_steps", "pending_counts"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def one_rank(rank: int) -> list[int]:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, router=BiasBalancedRouter(6, 4))
    model = nn.parallel.DistributedDataParallel(head)
    for batch in torch.randn(5, 24, 6):
        model(batch[12 * rank : 12 * rank + 12]).sum().backward()
        optimizer_step(head.router)
    return head.router.bias_steps.tolist()


def test_two_ranks_move_the_bias_as_the_definition_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gate = SparseMoE(6, 3, num_experts=4, expert_width=5, router=BiasBalancedRouter(6, 4)).router.gate
    steps = torch.zeros(4)
    for batch in torch.randn(5, 24, 6)[:4]:  # the counts of the last batch wait for the next pass
        chosen = (gate(batch).sigmoid() + 0.001 * steps).topk(2).indices
        counts = torch.bincount(chosen.flatten(), minlength=4).float()
        steps += torch.sign(counts.mean() - counts)
    assert run_on_ranks(one_rank, tmp_path) == [steps.tolist()] * 2
