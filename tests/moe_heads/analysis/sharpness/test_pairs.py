"""Eigenvalues of largest magnitude, and negative curvature in the report."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.progress import Progress
from moe_heads.callbacks import SharpnessCallback
from tests.support.hessians import classification, cross_entropy, dense_hessian, small_mlp
from tests.support.lightning_models import PlainModule, loader


def saddle(model: nn.Module, batch: Any) -> Tensor:
    return -cross_entropy(model, batch)


def test_eigenvalues_of_largest_magnitude_with_their_vectors() -> None:
    model, batches = small_mlp(), [classification(20, 5), classification(7, 5)]
    exact = sum(len(batch[1]) / 27 * dense_hessian(model, saddle, batch) for batch in batches)
    values, vectors = torch.linalg.eigh(exact)
    order = values.abs().argsort(descending=True)
    result = sharpness(model, saddle, batches, which="magnitude", num_eigenvalues=3, keep_eigenvectors=True)
    assert result.eigenvalues_converged and result.which == "magnitude"
    np.testing.assert_allclose(result.eigenvalues, values[order[:3]], rtol=1e-5)
    assert result.eigenvectors is not None
    overlaps = (result.eigenvectors * vectors.T[order[:3]]).sum(1).abs()
    np.testing.assert_allclose(overlaps, torch.ones(3), rtol=1e-4)
    assert result.lambda_min == pytest.approx(float(values[0]), rel=1e-5)
    assert result.lambda_max == pytest.approx(float(values[-1]), rel=1e-5)
    assert sum(block.shares[0] for block in result.blocks.values()) == pytest.approx(1)
    metrics = result.metrics()
    assert metrics["lambda_magnitude_1"] == result.eigenvalues[0] < 0 < metrics["lambda_max"]
    assert "lambda_2" not in metrics
    assert "| λ1 by magnitude | -" in result.summary() and "| λmax | " in result.summary()
    assert result.plot()[1].get_title().startswith("eigenvalue of largest magnitude -")


def test_negative_curvature_is_in_the_summary_without_a_warning() -> None:
    model, batch = small_mlp(), classification(20, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sharpness(model, saddle, [batch], num_eigenvalues=2, max_steps=57)
    assert result.is_negative_dominant and result.lambda_max == result.eigenvalues[0]
    assert (
        f"**Negative curvature**: λmin = {result.lambda_min:.5g} is larger in magnitude than λmax" in result.summary()
    )
    assert 'Pass which="magnitude"' in result.summary()
    other = sharpness(model, cross_entropy, [batch], num_eigenvalues=2)
    assert not other.is_negative_dominant and "Negative curvature" not in other.summary()
    assert not replace(result, lambda_min=math.nan).is_negative_dominant
    by_magnitude = replace(result, which="magnitude", eigenvalues=(result.lambda_min, 1e-3))
    assert by_magnitude.is_negative_dominant and "Pass which" not in by_magnitude.summary()


def test_float32_and_the_end_of_the_time() -> None:
    model, batch = small_mlp(torch.float32), classification(40, 5, dtype=torch.float32)
    result = sharpness(model, saddle, [batch], which="magnitude", num_eigenvalues=2, density=False)
    assert result.eigenvalues_converged and max(result.residuals) <= 1e-3
    exact = torch.linalg.eigvalsh(dense_hessian(small_copy(model), saddle, (batch[0].double(), batch[1])))
    assert result.eigenvalues[0] == pytest.approx(float(exact[exact.abs().argmax()]), rel=1e-4)
    ended = sharpness(model, saddle, [batch], which="magnitude", progress=Progress(max_time=1e-9))
    assert ended.partial and not ended.eigenvalues_converged


def small_copy(model: nn.Module) -> nn.Module:
    copied = small_mlp()
    copied.load_state_dict(model.state_dict())
    return copied


def test_a_singular_matrix_has_no_negative_eigenvalue_to_certify() -> None:
    model, batch = small_mlp(torch.float32), classification(40, 5, dtype=torch.float32)
    parts: dict[str, Any] = {
        "outputs_fn": lambda model, batch: model(batch[0]),
        "output_loss": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
    }
    options: dict[str, Any] = {"matrix": "gauss_newton", "num_eigenvalues": 2, "density": False, **parts}
    result = sharpness(model, cross_entropy, [batch], which="magnitude", **options)
    assert result.eigenvalues_converged
    np.testing.assert_allclose(result.eigenvalues, sharpness(model, cross_entropy, [batch], **options).eigenvalues)


def test_the_option_of_the_callback() -> None:
    callback = SharpnessCallback(which="magnitude", splits=["train"], num_eigenvalues=2, density=False)
    result = callback.analyze(PlainModule(), train=loader())["train"]
    assert result.which == "magnitude" and {"lambda_max", "lambda_magnitude_2"} <= result.metrics().keys()
    with pytest.raises(ValueError, match="which: expected one of 'largest', 'magnitude', got 'smallest'"):
        SharpnessCallback(which="smallest")
    with pytest.raises(ValueError, match="which: expected its default with engine='pyhessian'"):
        SharpnessCallback(which="magnitude", engine="pyhessian")
