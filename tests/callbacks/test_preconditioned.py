"""Preconditioned sharpness in the sharpness callback, along a training with Adam."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from moe_heads.analysis import preconditioned_sharpness, preconditioner_of
from moe_heads.callbacks import SharpnessCallback
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer

FAST: dict[str, Any] = {"num_eigenvalues": 1, "trace_tolerance": 0.9, "density": False, "routing_steps": ()}


class OfAdam(PlainModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=1.0)


def callback(**options: Any) -> SharpnessCallback:
    return SharpnessCallback(splits=["train"], preconditioned=True, on_error="raise", **FAST, **options)


def test_logged_with_its_threshold_along_the_training_which_does_not_notice() -> None:
    bare = OfAdam()
    trainer(max_epochs=2).fit(bare, loader())
    own, sharpness = OfAdam(), callback(every_n_train_steps=2)
    run = trainer(sharpness, max_epochs=2)
    run.fit(own, loader())
    assert_same(snapshot(bare), snapshot(own))
    points = sharpness.tracked_steps["train"]
    assert list(points) == [2, 4, 6]
    for point in points.values():
        assert point["preconditioned_threshold"] == pytest.approx(19 * (2 / 0.01 - 1.0))
        assert point["preconditioned_lambda_max"] > 0 and point["preconditioned_residual"] <= 1e-3
    result = sharpness.results["train"].preconditioned
    assert result is not None and "Optimizer's metric" in sharpness.results["train"].summary()
    key = "sharpness/train/preconditioned_lambda_max"
    assert float(run.callback_metrics[key]) == pytest.approx(result.lambda_max)
    exact = preconditioned_sharpness(
        own,
        lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]),
        list(loader()),
        preconditioner_of(run.optimizers[0], own),
    )
    assert result.lambda_max == pytest.approx(exact.lambda_max, rel=1e-3)


def test_a_part_of_the_parameters() -> None:
    own, sharpness = OfAdam(), callback(params=["head"])
    trainer(sharpness).fit(own, loader())
    result = sharpness.results["train"].preconditioned
    assert result is not None and result.num_parameters == sum(p.numel() for p in own.head.parameters())


def test_wrong_optimizers_are_errors_before_training() -> None:
    with pytest.raises(MisconfigurationException, match=r"expected Adam, AdamW or RMSprop.*got SGD"):
        trainer(callback()).fit(PlainModule(), loader())
    with pytest.raises(MisconfigurationException, match="expected a training with one optimizer, got 0"):
        callback().analyze(PlainModule(), train=list(loader()))
    with pytest.raises(ValueError, match="preconditioned: expected its default with engine='pyhessian'"):
        SharpnessCallback(engine="pyhessian", preconditioned=True)
    with pytest.raises(ValueError, match="preconditioned: expected True or False, got 1"):
        SharpnessCallback(preconditioned=1)
