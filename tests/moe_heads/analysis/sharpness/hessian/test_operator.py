import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.products import GraphMode
from tests.support.hessians import Once, classification, cross_entropy, dense_hessian, small_cnn, small_mlp

MODES = pytest.mark.parametrize("mode", ["kept", "rebuilt"])


def dense(operator: HessianOperator) -> Tensor:
    identity = torch.eye(operator.num_parameters, dtype=operator.dtype)
    return torch.stack([operator.matvec(row) for row in identity])


@MODES
def test_equals_dense_hessian(mode: GraphMode) -> None:
    model, batch = small_mlp(), classification(20, 5)
    operator = HessianOperator(model, cross_entropy, [batch], mode=mode)
    assert operator.mode == mode
    torch.testing.assert_close(dense(operator), dense_hessian(model, cross_entropy, batch), rtol=1e-9, atol=1e-12)


def test_softmax_regression_closed_form() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    x, y = classification(15, 4)
    p = model(x).detach().softmax(1)
    # Mean over samples of (diag p - p p^T) ⊗ x x^T.
    expected = torch.einsum("nab,ni,nj->aibj", torch.diag_embed(p) - p[:, :, None] * p[:, None], x, x) / len(x)
    actual = dense(HessianOperator(model, cross_entropy, [(x, y)]))
    torch.testing.assert_close(actual, expected.reshape(12, 12), rtol=1e-9, atol=1e-12)


@MODES
def test_uneven_batches_equal_one_batch(mode: GraphMode) -> None:
    model = small_mlp()
    x, y = classification(25, 5)
    parts = list(zip(x.split([12, 12, 1]), y.split([12, 12, 1]), strict=True))
    whole = HessianOperator(model, cross_entropy, [(x, y)])
    split = HessianOperator(model, cross_entropy, iter(parts), mode=mode)
    assert split.num_samples == whole.num_samples == 25
    torch.testing.assert_close(dense(split), dense(whole), rtol=1e-9, atol=1e-12)


def test_kept_equals_rebuilt_with_symmetry_in_float32() -> None:
    model, batch = small_cnn().eval(), classification(30, 1, 8, 8, dtype=torch.float32)
    kept = HessianOperator(model, cross_entropy, [batch])
    rebuilt = HessianOperator(model, cross_entropy, [batch], graph_memory=0)
    assert (kept.mode, rebuilt.mode) == ("kept", "rebuilt")
    u, v = torch.randn(2, kept.num_parameters)
    hu, hv = kept.matvec(u), kept.matvec(v)
    torch.testing.assert_close(rebuilt.matvec(v), hv, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u @ hv, v @ hu, rtol=1e-4, atol=1e-4)


def test_float32_batch_norm_network_equals_float64() -> None:
    model, batch = small_cnn().eval(), classification(30, 1, 8, 8, dtype=torch.float32)
    operator = HessianOperator(model, cross_entropy, [batch])
    expected = dense_hessian(copy.deepcopy(model).double(), cross_entropy, (batch[0].double(), batch[1]))
    v = torch.randn(operator.num_parameters)
    torch.testing.assert_close(operator.matvec(v).double(), expected @ v.double(), rtol=1e-3, atol=1e-5)


def test_scipy_finds_the_dense_eigenvalues() -> None:
    model, batch = small_mlp(), classification(20, 5)
    operator = HessianOperator(model, cross_entropy, [batch])
    as_scipy = LinearOperator(operator.shape, lambda v: operator.matvec(torch.from_numpy(v)).numpy(), dtype=np.float64)
    expected = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))[-3:].numpy()
    np.testing.assert_allclose(np.sort(eigsh(as_scipy, k=3, which="LA")[0]), expected, rtol=1e-8)


def test_bookkeeping() -> None:
    model = small_mlp()
    operator = HessianOperator(model, cross_entropy, [classification(4, 5)])
    assert operator.num_products == 0
    operator.matvec(torch.ones(57))
    operator.matvec(torch.ones(57))
    assert operator.num_products == 2
    assert operator.shape == (57, 57)
    assert operator.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert operator.slices["2.weight"] == slice(36, 54)
    assert all(p.grad is None for p in model.parameters())


def test_graph_memory_decides_by_the_size_of_all_batches() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = classification(256, 5, dtype=torch.float32)

    def num_kept(batches: list[tuple[Tensor, Tensor]], graph_memory: int) -> int:
        operator = HessianOperator(model, cross_entropy, batches, graph_memory=graph_memory)
        operator.matvec(torch.ones(operator.num_parameters))
        assert operator.mode == ("kept" if operator.num_kept else "rebuilt")
        return operator.num_kept

    # 256 samples hold at least the 64 float32 activations each.
    assert num_kept([batch], 256 * 64 * 4) == 0
    assert num_kept([batch], 2**20) == 1
    few = num_kept([batch] * 20, 2**20)
    assert 1 < few < 20 and num_kept([batch] * 20, 2**21) >= 2 * few
    assert 1 <= num_kept([(batch[0][:8], batch[1][:8]), *[batch] * 20], 2**20) <= few + 1


def test_batches_that_do_not_fit_are_rebuilt_beside_the_others() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    batches = [classification(size, 5) for size in (200, 256, 256, 30)]
    operator = HessianOperator(model, cross_entropy, batches, graph_memory=2**19)
    v = torch.randn(operator.num_parameters, dtype=torch.float64)
    operator.matvec(v)
    assert 0 < operator.num_kept < 4
    x, y = zip(*batches, strict=True)
    whole = HessianOperator(model, cross_entropy, [(torch.cat(x), torch.cat(y))])
    torch.testing.assert_close(operator.matvec(v), whole.matvec(v), rtol=1e-9, atol=1e-12)


@MODES
def test_strata_sum_up_to_the_whole(mode: GraphMode) -> None:
    model, batches = small_mlp(), [classification(size, 5) for size in (5, 4, 4, 7)]
    operator = HessianOperator(model, cross_entropy, batches, mode=mode)
    v = torch.randn(57, dtype=torch.float64)
    assert operator.num_strata == 4
    parts = torch.stack([operator.matvec(v, stratum) for stratum in range(4)])
    assert operator.num_products == 1
    torch.testing.assert_close(parts.sum(0), operator.matvec(v))
    first = HessianOperator(model, cross_entropy, batches[:1]).matvec(v)
    torch.testing.assert_close(parts[0], 5 / 20 * first)
    many = HessianOperator(model, cross_entropy, [classification(2, 5) for _ in range(40)])
    assert many.num_strata == 16
    torch.testing.assert_close(sum(many.matvec(v, s) for s in range(16)), many.matvec(v))


def test_strata_stay_the_same_when_memory_halves_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = small_mlp(), [classification(size, 5) for size in (8, 6, 10)]
    expected = HessianOperator(model, cross_entropy, batches)
    v = torch.randn(57, dtype=torch.float64)

    def tight(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(batch[0]) > 3:
            raise torch.OutOfMemoryError("too many")
        return cross_entropy(m, batch)

    operator = HessianOperator(model, tight, batches)
    for stratum in (1, 0, 2):
        torch.testing.assert_close(operator.matvec(v, stratum), expected.matvec(v, stratum))
    assert operator.mode == "rebuilt" and operator.num_strata == 3


def test_some_parameters_only() -> None:
    model, batch = small_mlp(), classification(20, 5)
    full = dense_hessian(model, cross_entropy, batch)
    last = HessianOperator(model, cross_entropy, [batch], params=list(model[2].parameters()))
    by_name = HessianOperator(model, cross_entropy, [batch], params=["2"])
    assert by_name.names == last.names == ("2.weight", "2.bias")
    assert torch.equal(dense(by_name), dense(last))
    torch.testing.assert_close(dense(last), full[36:, 36:], rtol=1e-9, atol=1e-12)
    model[2].requires_grad_(False)
    first = HessianOperator(model, cross_entropy, [batch])
    assert first.names == ("0.weight", "0.bias")
    torch.testing.assert_close(dense(first), full[:36, :36], rtol=1e-9, atol=1e-12)


class Branches(nn.Module):
    """The last branch is reached by no sample, the shift only linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, self.branches[0](x), self.branches[1](x).tanh())


@MODES
def test_unused_and_linear_parameters_have_zero_rows(mode: GraphMode) -> None:
    model = Branches().double()

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m, batch) + m.shift

    matrix = dense(HessianOperator(model, loss, [classification(20, 5)], mode=mode))
    assert matrix[:37].any() and matrix[0].count_nonzero() == 0  # the shift comes first
    assert matrix[1:37, 1:37].any() and not matrix[37:].any() and not matrix[:, 37:].any()


@MODES
def test_linear_loss_has_zero_hessian(mode: GraphMode) -> None:
    model = nn.Linear(3, 1)
    operator = HessianOperator(model, lambda m, x: m(x).mean(), [torch.randn(4, 3)], mode=mode)
    assert not operator.matvec(torch.ones(4)).any()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_attention_in_analysis_mode() -> None:
    model, (x, y) = Attention(), classification(6, 4, 8, dtype=torch.float32)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    with analysis_mode(model):
        actual = HessianOperator(model, cross_entropy, [(x, y)]).matvec(v)
        expected = HessianOperator(model.double(), cross_entropy, [(x.double(), y)]).matvec(v)
    assert actual.any()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-3, atol=1e-5)


def test_fused_attention_error_names_cause_and_remedy() -> None:
    model, batch = Attention(), classification(6, 4, 8, dtype=torch.float32)
    with pytest.raises(
        RuntimeError, match=r"^attention \(MultiheadAttention\): .*no second derivative .*analysis_mode"
    ) as caught:
        operator = HessianOperator(model, cross_entropy, [batch])
        operator.matvec(torch.ones(operator.num_parameters))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("outer", [Tensor.sum, lambda y: y.square().sum()], ids=["linear", "curved"])
def test_once_differentiable_function_is_an_error(outer: Callable[[Tensor], Tensor]) -> None:
    # torch by itself returns zeros for such a product.
    with pytest.raises(RuntimeError, match=r"no second derivative .*once_differentiable"):
        operator = HessianOperator(nn.Linear(2, 1), lambda m, x: outer(Once.apply(m(x))), [torch.randn(3, 2)])
        operator.matvec(torch.ones(3))


def test_errors_of_the_loss_itself_pass_unchanged() -> None:
    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("my own: is not implemented")

    with pytest.raises(RuntimeError, match=r"^my own"):
        HessianOperator(nn.Linear(2, 1), loss, [torch.randn(3, 2)])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    model, batch = small_mlp(), classification(10, 5)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.inner[:2], x.requires_grad_(), use_reentrant=use_reentrant)
            return self.inner[2](hidden)

    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            HessianOperator(Checkpointed(), cross_entropy, [batch])
    else:
        for graph_memory in (None, 0):
            actual = dense(HessianOperator(Checkpointed(), cross_entropy, [batch], graph_memory=graph_memory))
            expected = dense_hessian(model, cross_entropy, (batch[0].detach(), batch[1]))
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_random_layers_draw_the_same_numbers_in_every_product() -> None:
    model, batch = small_mlp(), classification(10, 5)

    def noisy(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(F.dropout(m(batch[0]), 0.5, training=True), batch[1])

    kept = HessianOperator(model, noisy, [batch])
    rebuilt = HessianOperator(model, noisy, [batch], graph_memory=0)
    v = torch.randn(57, dtype=torch.float64)
    state = torch.get_rng_state()
    first = rebuilt.matvec(v)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(rebuilt.matvec(v), first)
    torch.testing.assert_close(kept.matvec(v), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_loss_and_the_batch(value: float) -> None:
    model, (x, y) = small_mlp(), classification(4, 5)
    spoilt = torch.full_like(x, float("nan")) if value != value else x + 1
    scale = 1.0 if value != value else value
    with pytest.raises(ValueError, match=r"loss_fn: expected a finite loss, got (nan|inf) as the loss of batch 1"):
        operator = HessianOperator(
            model, lambda m, b: cross_entropy(m, b) * (1.0 if torch.equal(b[0], x) else scale), [(x, y), (spoilt, y)]
        )
        operator.matvec(torch.ones(57))


def test_non_finite_second_derivative_is_an_error() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    operator = HessianOperator(model, lambda m, x: m(x).abs().pow(1.5).mean(), [torch.ones(3, 2)])
    with pytest.raises(ValueError, match="finite second derivatives"):
        operator.matvec(torch.ones(2))


def test_bad_losses() -> None:
    model, batch = small_mlp(), classification(4, 5)

    def multiplied(loss_fn: Any) -> Tensor:
        return HessianOperator(model, loss_fn, [batch]).matvec(torch.ones(57, dtype=torch.float64))

    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar tensor.*got shape \(4,\)"):
        multiplied(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar tensor.*got float"):
        multiplied(lambda m, b: cross_entropy(m, b).item())
    with pytest.raises(ValueError, match="losses without a graph of them"):
        multiplied(lambda m, b: cross_entropy(m, b).detach())


def test_bad_data_and_vectors() -> None:
    batch = classification(4, 5)
    with pytest.raises(ValueError, match="batches"):
        HessianOperator(small_mlp(), cross_entropy, [])
    with pytest.raises(ValueError, match=r"vector: expected shape \(57,\), got \(3,\)"):
        HessianOperator(small_mlp(), cross_entropy, [batch]).matvec(torch.ones(3))


@pytest.mark.parametrize("mode", ["kept"])
def test_what_lies_before_the_parameters_is_computed_once(mode: GraphMode) -> None:
    calls = 0

    class Counted(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(x)

    model = nn.Sequential(nn.Linear(5, 40), Counted(), nn.Linear(40, 3)).double()
    batch = classification(20, 5)
    expected = dense_hessian(model, cross_entropy, batch)[-123:, -123:]
    operator = HessianOperator(model, cross_entropy, [batch], params=["2"], mode=mode)
    operator.matvec(torch.ones(123, dtype=torch.float64))
    before = calls
    torch.testing.assert_close(dense(operator), expected, rtol=1e-9, atol=1e-12)
    assert calls == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("head", "params: expected a list of parameters or of their names, got 'head'"),
        (["head"], "or names of parameters or modules such as '0.weight', got 'head'"),
        ([torch.ones(2)], r"got a tensor of shape \(2,\)"),
        ([], "params: expected at least one parameter, got none"),
    ],
)
def test_bad_selections(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianOperator(small_mlp(), cross_entropy, [classification(4, 5)], params=params)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    model, batch = small_cnn().eval(), classification(30, 1, 8, 8, dtype=torch.float32)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = HessianOperator(model, cross_entropy, [batch]).matvec(v)
    for graph_memory in (None, 0):
        operator = HessianOperator(model.cuda(), cross_entropy, [batch], graph_memory=graph_memory)
        torch.testing.assert_close(operator.matvec(v.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
