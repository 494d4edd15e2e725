import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian import OutputLoss
from tests.support.hessians import classification, cross_entropy, dense_gauss_newton, small_mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


def outputs_fn(model: nn.Module, batch: Any) -> Tensor:
    outputs: Tensor = model(batch[0])
    return outputs


def output_loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


PARTS: dict[str, Any] = {"outputs_fn": outputs_fn, "output_loss": output_loss}


class WithOutputs(nn.Module):
    """A module that brings its outputs and their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs

    def analysis_outputs(self, batch: Any) -> Tensor:
        return self(batch[0])

    def analysis_output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_certified_spectrum_of_the_gauss_newton_matrix() -> None:
    model = small_mlp()
    batches = [classification(20, 5), classification(7, 5)]
    exact = sum(len(batch[1]) / 27 * dense_gauss_newton(model, outputs_fn, output_loss, batch) for batch in batches)
    assert isinstance(exact, Tensor)
    before = copy.deepcopy(model.state_dict())
    result = sharpness(
        model, cross_entropy, batches, matrix="gauss_newton", **PARTS, block_eigenvalues=True, keep_eigenvectors=True
    )
    values = torch.linalg.eigvalsh(exact).flip(0)
    assert result.matrix == "gauss_newton" and result.converged
    assert result.eigenvalues == pytest.approx(values[:5].tolist(), rel=1e-5)
    assert result.trace == pytest.approx(float(exact.trace()), abs=1e-9 + 4 * result.trace_stderr)
    assert result.lambda_min > -1e-12
    block = exact[:36, :36]
    assert result.blocks["0"].lambda_max == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)
    assert result.blocks["0"].trace == pytest.approx(
        float(block.trace()), abs=1e-9 + 4 * result.blocks["0"].trace_stderr
    )
    assert "| matrix | Gauss-Newton matrix |" in result.summary() and "matrix-vector products" in result.summary()
    assert result.plot()[1].get_xlabel() == "eigenvalue of the Gauss-Newton matrix"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_every_way_to_define_the_outputs_gives_the_same_matrix() -> None:
    batch = classification(20, 5)
    model = WithOutputs()
    options: dict[str, Any] = {"matrix": "gauss_newton", "density": False}
    first = sharpness(model, cross_entropy, [batch], **options)
    assert sharpness(model, cross_entropy, [batch], **options, **PARTS).eigenvalues == first.eigenvalues
    assert sharpness(model, OutputLoss(**PARTS), [batch], **options).eigenvalues == first.eigenvalues
    assert sharpness(model, cross_entropy, [batch], density=False).eigenvalues != first.eigenvalues


def test_float32_is_checked_in_float64() -> None:
    model, batch = small_mlp(torch.float32), classification(40, 5, dtype=torch.float32)
    result = sharpness(model, cross_entropy, [batch], matrix="gauss_newton", **PARTS, num_eigenvalues=2)
    assert result.converged and result.certificate is not None and not result.certificate.unchecked
    assert 0 < result.certificate.rounding < 1e-4 and result.certificate.curvature_error < 1e-5
    assert result.lambda_min > -1e-5 * result.eigenvalues[0]


class _Doubled(torch.autograd.Function):
    """The identity with a gradient that is constant for the first derivative and wrong for the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.5 * (grad - grad.detach())


def test_a_wrong_second_derivative_of_the_loss_is_found() -> None:
    parts = {**PARTS, "output_loss": lambda outputs, batch: output_loss(_Doubled.apply(outputs), batch)}
    model, batch = small_mlp(), classification(20, 5)
    with pytest.warns(UserWarning, match="The products are not the derivative of the gradient"):
        result = sharpness(model, OutputLoss(**parts), [batch], matrix="gauss_newton", density=False)
    assert result.certificate is not None and result.certificate.derivative_error == 0
    assert result.certificate.curvature_error > 0.1 and not result.converged


def test_losses_that_define_no_gauss_newton_matrix() -> None:
    model, batch = small_mlp(), classification(20, 5)
    calls: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(model, batch)

    with pytest.raises(ValueError, match=r"outputs_fn: expected a function, got None\. A scalar loss_fn does not"):
        sharpness(model, loss_fn, [batch], matrix="gauss_newton")
    with pytest.raises(ValueError, match="output_loss: expected a function, got None"):
        sharpness(model, loss_fn, [batch], matrix="gauss_newton", outputs_fn=outputs_fn)
    with pytest.raises(ValueError, match='outputs_fn: expected None with matrix="hessian"'):
        sharpness(model, loss_fn, [batch], **PARTS)
    with pytest.raises(ValueError, match="output_loss: expected a function or None, got 3"):
        sharpness(model, loss_fn, [batch], matrix="gauss_newton", outputs_fn=outputs_fn, output_loss=3)
    with pytest.raises(ValueError, match="matrix: expected one of"):
        sharpness(model, loss_fn, [batch], matrix="fisher")
    assert not calls


def test_another_loss_in_a_later_batch_is_found() -> None:
    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1 if len(batch[1]) == 7 else 0.0)

    batches = [classification(20, 5), classification(7, 5)]
    with pytest.raises(ValueError, match=r"output_loss: expected the loss of loss_fn, .* for batch 1, got"):
        sharpness(small_mlp(), smoothed, batches, matrix="gauss_newton", **PARTS)
    with pytest.raises(ValueError, match="output_loss: expected a scalar tensor, the mean loss of batch 0, got shape"):
        sharpness(
            small_mlp(),
            cross_entropy,
            batches,
            matrix="gauss_newton",
            outputs_fn=outputs_fn,
            output_loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"),
        )


def test_the_end_of_the_time_gives_a_partial_result() -> None:
    result = sharpness(
        small_mlp(),
        cross_entropy,
        [classification(20, 5)],
        matrix="gauss_newton",
        **PARTS,
        progress=Progress(max_time=1e-9),
    )
    assert result.partial and result.matrix == "gauss_newton" and len(result.eigenvalues) == 1


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 11, (4, 6))
    if kind == "ViTForImageClassification":
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2
        )
        config.num_labels = 3
        return transformers.ViTForImageClassification(config), {
            "pixel_values": torch.randn(4, 3, 4, 4),
            "labels": torch.randint(0, 3, (4,)),
        }
    if kind == "BertForMaskedLM":
        config = transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        return transformers.BertForMaskedLM(config), {"input_ids": tokens, "labels": tokens.clone()}
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens.clone()}


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "ViTForImageClassification", "BertForMaskedLM"])
def test_a_hugging_face_model_brings_its_logits_and_its_loss(kind: str) -> None:
    model, batch = hugging_face(kind)
    result = sharpness(
        model,
        lambda model, batch: model(**batch).loss,
        [batch],
        matrix="gauss_newton",
        num_eigenvalues=1,
        density=False,
        max_probes=8,
    )
    assert result.eigenvalues_converged and result.eigenvalues[0] > 0
    assert result.lambda_min > -1e-4 * result.eigenvalues[0]


def test_a_hugging_face_model_without_labels() -> None:
    model, batch = hugging_face("GPT2LMHeadModel")
    del batch["labels"]
    with pytest.raises(ValueError, match='batches: expected mappings with the key "labels"'):
        sharpness(model, lambda model, batch: model(**batch).logits.mean(), [batch], matrix="gauss_newton")
