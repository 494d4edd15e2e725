"""A loss that exists in training mode only raises an error with a remedy, and works with analysis_loss."""

from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback
from tests.support.untouched import untouched


class Detector(pl.LightningModule):
    """Returns its loss in training mode, and a list of detections in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        found = self.layers(x)
        return {"regression": (found - y).square().mean()} if self.training else list(found)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return sum(self(*batch).values())


class Analyzed(Detector):
    def analysis_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.train()
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.Dropout)):
                module.eval()
        return self.training_step(batch)


class Silent(Detector):
    """Returns nothing outside training."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        return super().training_step(batch) if self.training else None


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(10, 4), torch.randn(10, 1)) for _ in range(2)]


@pytest.mark.parametrize("kind", [Detector, Silent])
@pytest.mark.parametrize("callback", [SharpnessCallback, LossLandscapeCallback])
def test_a_loss_in_training_mode_only_is_explained(kind: type[Detector], callback: Any) -> None:
    model, data = kind(), batches()
    with untouched(model), pytest.raises(MisconfigurationException, match=r"training mode there is one.*analysis_loss"):
        callback(splits=["train"]).analyze(model, train=data)


def test_another_error_is_raised_unchanged() -> None:
    class Broken(Detector):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        SharpnessCallback().analyze(Broken(), train=batches())


def test_a_dict_without_a_loss_raises_an_error_with_its_keys() -> None:
    class Parts(Detector):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            return {"regression": torch.zeros(()), "boxes": torch.zeros(())}

    with pytest.raises(MisconfigurationException, match=r"got a dict with \['boxes', 'regression'\]"):
        SharpnessCallback().analyze(Parts(), train=batches())


def test_the_own_loss_gives_what_the_same_layers_give_in_evaluation_mode() -> None:
    model, data = Analyzed(), batches()
    options: dict[str, Any] = {"num_eigenvalues": 2, "perturbation": True}
    landscape: dict[str, Any] = {"plane_splits": [], "line_points": 3}
    with untouched(model):
        found = SharpnessCallback(**options).analyze(model, train=data)["train"]
        line = LossLandscapeCallback(**landscape).analyze(model, train=data)["train"].line

    def plain(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (m.layers.eval()(batch[0]) - batch[1]).square().mean()

    expected = SharpnessCallback(loss_fn=plain, **options).analyze(model, train=data)["train"]
    straight = LossLandscapeCallback(loss_fn=plain, **landscape).analyze(model, train=data)["train"].line
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-4)
    assert found.perturbation.metrics() == pytest.approx(expected.perturbation.metrics(), rel=1e-4)
    assert line.losses.tolist() == pytest.approx(straight.losses.tolist(), rel=1e-4)
