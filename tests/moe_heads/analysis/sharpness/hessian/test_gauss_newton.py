import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLoss
from moe_heads.analysis.sharpness.hessian.products import GraphMode
from tests.support.hessians import (
    Once,
    classification,
    cross_entropy,
    dense_gauss_newton,
    dense_hessian,
    small_cnn,
    small_mlp,
)

MODES = pytest.mark.parametrize("mode", ["kept", "rebuilt"])


def outputs_fn(model: nn.Module, batch: Any) -> Tensor:
    outputs: Tensor = model(batch[0])
    return outputs


def output_loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


LOSS = OutputLoss(outputs_fn, output_loss)


def gauss_newton(model: nn.Module, *batches: Any, loss_fn: OutputLoss = LOSS, **options: Any) -> HessianOperator:
    return HessianOperator(model, loss_fn, list(batches), matrix="gauss_newton", **options)


def dense(operator: HessianOperator) -> Tensor:
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.num_parameters, dtype=operator.dtype)])


@MODES
def test_equals_the_dense_matrix_and_has_no_negative_eigenvalue(mode: GraphMode) -> None:
    model, batch = small_mlp(), classification(20, 5)
    operator = gauss_newton(model, batch, mode=mode)
    assert (operator.mode, operator.matrix) == (mode, "gauss_newton")
    found = dense(operator)
    torch.testing.assert_close(found, dense_gauss_newton(model, outputs_fn, output_loss, batch), rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-14
    assert operator.center_loss == pytest.approx(cross_entropy(model, batch).item())
    # it is not the Hessian, which has negative ones
    assert float(torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))[0]) < -1e-3


def test_equals_the_hessian_of_a_model_that_is_linear_in_its_parameters() -> None:
    model, batch = nn.Linear(4, 3).double(), classification(15, 4)
    expected = dense_hessian(model, cross_entropy, batch)
    torch.testing.assert_close(dense(gauss_newton(model, batch)), expected, rtol=1e-9, atol=1e-13)


def test_folded_batch_norms() -> None:
    model, batch = small_cnn().double().eval(), classification(12, 1, 8, 8)
    operator = gauss_newton(model, batch)
    assert operator.num_folded == 1
    expected = dense_gauss_newton(model, outputs_fn, output_loss, batch)
    torch.testing.assert_close(dense(operator), expected, rtol=1e-9, atol=1e-12)


def test_float32_equals_float64() -> None:
    model, batch = small_cnn().eval(), classification(12, 1, 8, 8, dtype=torch.float32)
    wide = copy.deepcopy(model).double()
    expected = dense_gauss_newton(wide, outputs_fn, output_loss, (batch[0].double(), batch[1]))
    found = dense(gauss_newton(model, batch)).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_uneven_batches_equal_one_batch() -> None:
    model = small_mlp()
    x, y = classification(25, 5)
    parts = list(zip(x.split([12, 12, 1]), y.split([12, 12, 1]), strict=True))
    torch.testing.assert_close(
        dense(gauss_newton(model, *parts)), dense(gauss_newton(model, (x, y))), rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_small_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(0, 11, (3, 6))
    loss = OutputLoss(
        lambda model, batch: model(input_ids=batch).logits,
        lambda logits, batch: F.cross_entropy(logits[:, :-1].reshape(-1, 11), batch[:, 1:].reshape(-1)),
    )
    with analysis_mode(model):
        operator = gauss_newton(model, tokens, loss_fn=loss)
        expected = dense_gauss_newton(model, loss.outputs_fn, loss.output_loss, tokens)
        vectors = torch.randn(3, operator.num_parameters, dtype=torch.float64)
        found = torch.stack([operator.matvec(vector) for vector in vectors])
    assert float((found - vectors @ expected).norm() / (vectors @ expected).norm()) < 1e-10


def test_a_checkpoint() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.body, x, use_reentrant=False))

    model, batch = Checkpointed().double(), classification(20, 5)
    expected = dense_gauss_newton(model, outputs_fn, output_loss, batch)
    for mode in ("kept", "rebuilt"):
        found = dense(gauss_newton(model, batch, mode=mode if mode == "rebuilt" else None))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_selected_and_unused_parameters() -> None:
    model, batch = small_mlp(), classification(20, 5)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    expected = dense_gauss_newton(model, outputs_fn, output_loss, batch)
    names = [name for name, _ in model.named_parameters()]
    found = dense(gauss_newton(model, batch))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert names[0] == "unused" and not found[:2].any() and not found[:, :2].any()
    last = dense(gauss_newton(model, batch, params=["2"]))
    torch.testing.assert_close(last, expected[-21:, -21:], rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_linear_in_the_outputs_has_no_curvature() -> None:
    linear = OutputLoss(outputs_fn, lambda outputs, batch: outputs.mean())
    assert not gauss_newton(small_mlp(), classification(20, 5), loss_fn=linear).matvec(torch.ones(57)).any()


def test_bad_input() -> None:
    model, batch = small_mlp(), classification(20, 5)
    with pytest.raises(ValueError, match="loss_fn: expected an OutputLoss for the Gauss-Newton matrix"):
        HessianOperator(model, cross_entropy, [batch], matrix="gauss_newton")
    with pytest.raises(ValueError, match="matrix: expected one of 'hessian', 'gauss_newton'"):
        HessianOperator(model, LOSS, [batch], matrix="fisher")
    pair = OutputLoss(lambda model, batch: (model(batch[0]), 1), lambda outputs, batch: outputs[0].mean())
    with pytest.raises(ValueError, match="outputs_fn: expected a floating-point tensor, got tuple"):
        gauss_newton(model, batch, loss_fn=pair)
    apart = OutputLoss(lambda model, batch: batch[0], lambda outputs, batch: outputs.mean())
    with pytest.raises(ValueError, match="depends on the parameters"):
        gauss_newton(model, batch, loss_fn=apart).matvec(torch.ones(57))


def test_a_layer_without_a_second_derivative_is_named() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    model = nn.Sequential(nn.Linear(5, 3), Square()).double()
    with pytest.raises(RuntimeError, match=r"1 \(Square\).*no second derivative|once_differentiable"):
        gauss_newton(model, classification(20, 5)).matvec(torch.ones(18))
