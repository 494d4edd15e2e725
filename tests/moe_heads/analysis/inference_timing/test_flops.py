from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Dense, SparseMoE
from moe_heads.analysis.inference_timing.flops import FORMULAS, Operator, record


def test_products_count_two_a_multiply_add_and_the_rest_is_named() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(8, 16)
    counted = record(lambda: F.gelu(layer(x)))
    assert counted.flops == 2 * 8 * 16 * 4
    assert counted.uncounted == {"aten.gelu": 1}
    product, activation = counted.operators
    assert product == Operator(2 * 8 * 16 * 4, 4 * (4 + 8 * 16 + 16 * 4 + 8 * 4))
    assert activation == Operator(0, 4 * 2 * 8 * 4, "aten.gelu")


def test_it_counts_in_inference_mode_as_outside_of_it() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3)), torch.randn(5, 1, 8, 8)
    expected = 2 * 5 * (36 * 9 * 2 + 72 * 3)
    assert record(lambda: model(x)).flops == expected
    with torch.inference_mode():
        assert record(lambda: model(x)).flops == expected


def test_views_are_no_operators_and_a_gather_reads_what_it_writes() -> None:
    x, rows = torch.randn(100, 4), torch.tensor([1, 2])
    (gather,) = record(lambda: x.t().t().index_select(0, rows).view(8)).operators
    assert gather.num_bytes == 2 * 2 * 4 * 4 + 2 * 8


def test_heads_count_as_their_own_formula_says() -> None:
    dense, x = Dense(16, 4, width=8).eval(), torch.randn(6, 16)
    assert record(lambda: dense(x)).flops == dense.flops(6).total
    # what the path "all" adds is the weighted sum of the logits, which the formula leaves out
    for dispatch, chosen, more in (("all", "total", 2 * 6 * 2 * 4), ("ragged", "active", 0), ("grouped", "active", 0)):
        head = SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch).eval()
        assert record(partial(head, x)).flops == getattr(head.flops(6), chosen) + more, dispatch


B, T, D, F_, H = 3, 5, 16, 32, 8


def encoder(layers: int = 1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, F_, batch_first=True)
    return (layer if layers == 1 else nn.TransformerEncoder(layer, layers)).eval()


def attention(length: int) -> int:
    """Of one sequence: four projections, and Q Kᵀ and A V."""
    return 2 * length * 4 * D * D + 2 * 2 * length * length * D


def layer_of(length: int) -> int:
    return attention(length) + 2 * length * 2 * D * F_


MASK = torch.arange(T) >= torch.tensor([[5], [4], [2]])


@pytest.mark.parametrize(
    ("module", "call", "flops"),
    [
        (nn.MultiheadAttention(D, 4, batch_first=True).eval(), lambda m, x: m(x, x, x), B * attention(T)),
        (encoder(), lambda m, x: m(x), B * layer_of(T)),
        (encoder(), lambda m, x: m(x, src_mask=torch.zeros(T, T, dtype=torch.bool)), B * layer_of(T)),
        (encoder(2), lambda m, x: m(x), B * 2 * layer_of(T)),
        # without padding: sequences of 5, 4 and 2 tokens
        (encoder(2), lambda m, x: m(x, src_key_padding_mask=MASK), 2 * sum(map(layer_of, (5, 4, 2)))),
        (nn.LSTM(D, H, batch_first=True), lambda m, x: m(x), 2 * B * T * 4 * H * (D + H)),
        (nn.LSTM(D, H, 2, bidirectional=True), lambda m, x: m(x), 2 * B * T * 4 * H * 2 * (D + H + 2 * H + H)),
        (nn.GRU(D, H, batch_first=True), lambda m, x: m(x), 2 * B * T * 3 * H * (D + H)),
        (nn.RNN(D, H, batch_first=True), lambda m, x: m(x), 2 * B * T * H * (D + H)),
        (nn.LSTMCell(D, H), lambda m, x: m(x[:, 0]), 2 * B * 4 * H * (D + H)),
        (nn.Linear(D, H), lambda m, x: m(x[0, 0]), 2 * D * H),
        (nn.Identity(), lambda m, x: m(x[0]) @ x[0, 0], 2 * T * D),
        (nn.Identity(), lambda m, x: m(x[0, 0]).dot(x[0, 1]), 2 * D),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fused_kernels_count_as_their_closed_form(
    module: nn.Module, call: Callable[[nn.Module, Tensor], object], flops: int
) -> None:
    x = torch.randn(B, T, D)
    counted = record(lambda: call(module, x))
    assert (counted.flops, counted.num_hidden) == (flops, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.fft.fft(x),
        lambda x: torch.cdist(x, x),
        lambda x: nn.Bilinear(D, D, 2)(x, x),
        lambda x: torch.linalg.inv(x[0, :, :T]),
        lambda x: torch.sparse.mm(torch.eye(T).to_sparse(), x[0]),
    ],
)
def test_products_without_a_formula_are_named(call: Callable[[Tensor], object]) -> None:
    counted = record(lambda: call(torch.randn(B, T, D)))
    assert counted.num_hidden >= 1


def test_passes_over_the_elements_hide_no_product() -> None:
    x = torch.randn(B, T, D)
    counted = record(
        lambda: F.normalize(F.layer_norm(F.interpolate(x.relu().softmax(-1), 7, mode="linear"), (7,))).sort()
    )
    assert len(counted.uncounted) > 5
    assert counted.num_hidden == 0


def test_the_recurrent_kernel_of_a_gpu_counts_as_that_of_a_cpu() -> None:
    lstm = nn.LSTM(D, H, 2, bidirectional=True)
    args = torch.zeros(T, B, D), list(lstm.parameters()), 4, None
    found = FORMULAS[torch.ops.aten._cudnn_rnn](*args, out_val=None)
    assert found == 2 * B * T * 4 * H * 2 * (D + H + 2 * H + H)


def test_a_sparse_tensor_counts_the_bytes_of_its_entries_and_indices() -> None:
    sparse, x = torch.eye(4).to_sparse(), torch.ones(4, 2)
    (product,) = record(lambda: torch.sparse.mm(sparse, x)).operators
    assert product.num_bytes >= 4 * (4 + 2 * 8) + 2 * 4 * 4 * 2
