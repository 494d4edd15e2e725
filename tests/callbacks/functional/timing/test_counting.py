import torch
from torch import nn
from torch.nn import functional as F

from moe_heads import Dense, SparseMoE
from moe_heads.callbacks.functional.timing.counting import Operator, count


def test_products_count_two_a_multiply_add_and_the_rest_is_named() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(8, 16)
    counted = count(lambda: F.gelu(layer(x)))
    assert counted.flops == 2 * 8 * 16 * 4
    assert counted.uncounted == {"aten.gelu": 1}
    product, activation = counted.operators
    assert product == Operator(2 * 8 * 16 * 4, 4 * (4 + 8 * 16 + 16 * 4 + 8 * 4))
    assert activation == Operator(0, 4 * 2 * 8 * 4)


def test_it_counts_in_inference_mode_as_outside_of_it() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3)), torch.randn(5, 1, 8, 8)
    expected = 2 * 5 * (36 * 9 * 2 + 72 * 3)
    assert count(lambda: model(x)).flops == expected
    with torch.inference_mode():
        assert count(lambda: model(x)).flops == expected


def test_views_are_no_operators_and_a_gather_reads_what_it_writes() -> None:
    x, rows = torch.randn(100, 4), torch.tensor([1, 2])
    (gather,) = count(lambda: x.t().t().index_select(0, rows).view(8)).operators
    assert gather.num_bytes == 2 * 2 * 4 * 4 + 2 * 8


def test_heads_count_as_their_own_formula_says() -> None:
    dense, x = Dense(16, 4, width=8).eval(), torch.randn(6, 16)
    assert count(lambda: dense(x)).flops == dense.flops(6).total
    # what the path "all" adds is the weighted sum of the biases, which the formula leaves out
    for dispatch, chosen, more in (("all", "total", 2 * 6 * 4 * 4), ("ragged", "active", 0), ("grouped", "active", 0)):
        head = SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch).eval()
        assert count(lambda head=head: head(x)).flops == getattr(head.flops(6), chosen) + more, dispatch
