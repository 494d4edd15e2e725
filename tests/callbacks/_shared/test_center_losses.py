"""All analyses of the same weights and samples evaluate the same loss."""

import itertools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback
from moe_heads.callbacks._shared.center_losses import CenterLossError, center_losses_of, check_center_losses


@dataclass
class Part:
    center_loss: float
    routing: Any = None


def test_losses_of_a_result_and_of_its_parts() -> None:
    assert center_losses_of("a/train", Part(1.0, routing=Part(2.0))) == {"a/train": 1.0, "a/train (routing)": 2.0}
    assert center_losses_of("a/train", SimpleNamespace(parts=(1, 2))) == {}
    assert center_losses_of("a/train", Part(math.nan)) == center_losses_of("a/train", object()) == {}


def test_what_differs_is_named_with_both_values() -> None:
    model = nn.Linear(1, 1)
    check_center_losses(model, {"a": 1.0, "b": 1.00001})
    with pytest.raises(CenterLossError, match=r"got 1\.18 in a and 1\.16 in b"):
        check_center_losses(model, {"a": 1.18, "b": 1.16})
    check_center_losses(nn.Sequential(model, nn.Linear(1, 1).bfloat16()), {"a": 1.18, "b": 1.179})
    with pytest.raises(CenterLossError):
        check_center_losses(nn.Linear(1, 1).double(), {"a": 1.0, "b": 1.00001})


class Frozen(pl.LightningModule):
    """Its loss is another one where the backbone is frozen, as it is while the curvature of the head is computed."""

    def __init__(self, lies: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.lies = nn.Linear(4, 5), nn.Linear(5, 3), lies

    def analysis_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features = self.backbone(batch[0]).tanh()
        if self.lies and not self.backbone.weight.requires_grad:
            features = 2 * features
        return nn.functional.cross_entropy(self.head(features), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.analysis_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(model: pl.LightningModule, *callbacks: Any) -> list[str]:
    data = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[*callbacks], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(data, 10))
    return [str(w.message) for w in caught if "/train" in str(w.message)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_callbacks_compare_what_they_evaluate(order: tuple[int, int]) -> None:
    sharpness = SharpnessCallback(splits=["train"], params=["head"], batch_size=10)
    landscape = LossLandscapeCallback(splits=["train"], params=["head"], batch_size=10, plane_splits=[], line_points=3)
    both = (sharpness, landscape)
    assert not [
        warned for warned in fit(Frozen(False), *(both[place] for place in order)) if "expected equal losses" in warned
    ]
    assert len(sharpness.results) == len(landscape.results) == 1
    warned = [
        warned for warned in fit(Frozen(True), *(both[place] for place in order)) if "expected equal losses" in warned
    ]
    assert len(warned) == 1
    assert "sharpness/train" in warned[0] and "loss_landscape/train (line)" in warned[0]
    # what was found first stays, and the second is not kept
    assert [len(callback.results) for callback in (both[place] for place in order)] == [1, 0]


def test_other_cuts_are_not_compared() -> None:
    sharpness = SharpnessCallback(splits=["train"], params=["head"], batch_size=10)
    landscape = LossLandscapeCallback(splits=["train"], params=["head"], batch_size=5, plane_splits=[], line_points=3)
    assert not [warned for warned in fit(Frozen(True), sharpness, landscape) if "expected equal losses" in warned]


def test_parts_of_one_analysis_are_compared_and_it_raises_on_request() -> None:
    callback = SharpnessCallback(splits=["train"], params=["head"], batch_size=10, perturbation=True, on_error="raise")
    with pytest.raises(CenterLossError, match=r"sharpness/train .*sharpness/train \(perturbation\)"):
        fit(Frozen(True), callback)
    assert callback.results == {}


def test_a_random_loss_is_one_function_too() -> None:
    class Random(Frozen):
        def analysis_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = nn.functional.dropout(batch[0], 0.5, training=True)
            return nn.functional.cross_entropy(self.head(self.backbone(x)), batch[1])

    sharpness = SharpnessCallback(splits=["train"], batch_size=5, perturbation=True, seed=3, on_error="raise")
    landscape = LossLandscapeCallback(
        splits=["train"], batch_size=5, plane_splits=[], line_points=3, seed=3, on_error="raise"
    )
    fit(Random(False), sharpness, landscape)
    line = landscape.results["train"].line
    perturbation = sharpness.results["train"].perturbation
    assert line is not None and perturbation is not None
    losses = [sharpness.results["train"].center_loss, perturbation.center_loss, line.center_loss]
    for one, other in itertools.pairwise(losses):
        assert one == pytest.approx(other, rel=1e-5)
