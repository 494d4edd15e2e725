"""The Gauss-Newton matrix in the sharpness callback: default outputs, keys, and what it does not share."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback
from moe_heads.callbacks._landscape_eigenvectors import _is_accurate
from moe_heads.lightning_modules import MoEClassifier
from tests.support.hessians import cross_entropy
from tests.support.lightning_models import NUM_FEATURES, PlainModule, loader, trainer

OPTIONS: dict[str, Any] = {"splits": ["train"], "num_samples": 16, "num_eigenvalues": 1, "density": False}


PARTS: dict[str, Any] = {
    "outputs_fn": lambda model, batch: model(batch[0]),
    "output_loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
}


def test_both_matrices_of_a_classifier_under_separate_keys() -> None:
    hessian, gauss_newton = SharpnessCallback(**OPTIONS), SharpnessCallback(matrix="gauss_newton", **OPTIONS)
    landscape = LossLandscapeCallback(splits=["train"], plane_splits=[], line_points=3, num_samples=16)
    module = MoEClassifier(nn.Linear(NUM_FEATURES, 6), nn.Linear(6, 3), schedule="constant")
    run = trainer(gauss_newton, hessian, landscape)
    run.fit(module, loader())
    metrics = run.callback_metrics
    assert float(metrics["gauss_newton/train/lambda_max"]) > 0
    assert metrics["gauss_newton/train/lambda_max"] != metrics["sharpness/train/lambda_max"]
    assert "sharpness/train/stability_threshold" in metrics and "gauss_newton/train/stability_threshold" not in metrics
    assert gauss_newton.results["train"].matrix == "gauss_newton" and hessian.results["train"].matrix == "hessian"
    assert SharpnessCallback(matrix="gauss_newton", name="ggn").name == "ggn"


def test_a_landscape_does_not_take_the_eigenvector_of_the_other_matrix() -> None:
    options = {**OPTIONS, "loss_fn": cross_entropy}
    for matrix, is_taken in (("hessian", True), ("gauss_newton", False)):
        sharpness = SharpnessCallback(matrix=matrix, **(PARTS if matrix == "gauss_newton" else {}), **options)
        result = sharpness.analyze(PlainModule(), train=loader())["train"]
        assert result.matrix == matrix and _is_accurate(result, 1) == is_taken


def test_errors_before_the_training() -> None:
    run = trainer(SharpnessCallback(matrix="gauss_newton", on_error="raise", **OPTIONS))
    with pytest.raises(ValueError, match="outputs_fn: expected a function, got None"):
        run.fit(PlainModule(), loader())
    with pytest.raises(ValueError, match='outputs_fn: expected None with matrix="hessian"'):
        SharpnessCallback(outputs_fn=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="output_loss: expected a function, got None"):
        SharpnessCallback(matrix="gauss_newton", outputs_fn=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="matrix: expected its default with engine='pyhessian'"):
        SharpnessCallback(matrix="gauss_newton", engine="pyhessian")
    with pytest.raises(ValueError, match="preconditioned: expected False with matrix='gauss_newton'"):
        SharpnessCallback(matrix="gauss_newton", preconditioned=True)
    with pytest.raises(ValueError, match="check_every_n_points: expected its default with engine='pyhessian'"):
        SharpnessCallback(engine="pyhessian", check_every_n_points=3)
    callback = SharpnessCallback(matrix="gauss_newton")
    assert "Gauss-Newton" in callback.unsupported_if_sharded()
