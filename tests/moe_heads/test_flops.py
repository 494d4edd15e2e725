"""Theoretical operations against the counter of torch."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_heads import Dense, Flops, SoftMoE, SparseMoE
from tests.support.head_zoo import FEATURES, ROUTERS, head_with


def counted(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(6, 32), (6, 5, 32)])
def test_dense_and_soft_heads_equal_torchs_count(shape: tuple[int, ...]) -> None:
    x, tokens = torch.randn(shape), 1 if len(shape) == 2 else shape[1]
    dense = Dense(32, 4, width=16).eval()
    assert dense.flops(6, tokens) == Flops(counted(dense, x), counted(dense, x))
    soft = SoftMoE(32, 4, num_experts=3, expert_width=16, slots_per_expert=1 if tokens == 1 else 2).eval()
    mixed_biases = 2 * 6 * 3 * 4 if tokens == 1 else 0  # the gates times the second biases: see Flops
    assert soft.flops(6, tokens).total == counted(soft, x) - mixed_biases


@pytest.mark.parametrize("router", list(ROUTERS))
def test_sparse_heads_equal_torchs_count(router: str) -> None:
    head = head_with(router, torch.float32, num_shared_experts=1)
    x = torch.randn(16, FEATURES)
    flops = head.flops(16)
    head.dispatch = "all"
    indices = head.router(x).indices
    # weights times logits of the choices, or all gates times the second biases: see Flops
    mixed = 4 if indices is None else indices.shape[1]
    assert flops.total == counted(head, x) - 2 * 16 * mixed * 3
    if router != "softmax":
        head.dispatch = "ragged"
        assert flops.active == counted(head, x)
    else:
        assert flops.active == flops.total


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 1), (3, 7)])
def test_where_experts_choose_what_they_take_is_counted(batch: int, tokens: int) -> None:
    head = head_with("expert_choice", torch.float32, dispatch="ragged")
    x = torch.randn(batch, FEATURES) if tokens == 1 else torch.randn(batch, tokens, FEATURES)
    assert head.flops(batch, tokens).active == counted(head, x)


def test_it_grows_with_the_batch_and_the_tokens() -> None:
    head = SparseMoE(8, 3)
    assert head.flops(6, 5).active == 30 * head.flops().active


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"batch": 2, "tokens": 0}, {"batch": 1.5}])
def test_bad_sizes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected an integer of at least 1, got"):
        Dense(8, 3).flops(**sizes)
