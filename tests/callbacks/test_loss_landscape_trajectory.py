"""Trajectories of runs that freeze and unfreeze layers, or are too short for a plane."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_heads.callbacks import LossLandscapeCallback
from tests.support.lightning_models import PlainModule, loader, trainer

SMALL: dict[str, Any] = {"splits": ["train"], "line_points": 3, "plane_points": 3, "on_error": "raise"}


class Switch(Callback):
    """Sets ``requires_grad`` of the body for some epochs."""

    def __init__(self, *trained: bool) -> None:
        self.trained = trained

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.body.requires_grad_(self.trained[trainer.current_epoch])


def fitted(*trained: bool, **options: Any) -> tuple[LossLandscapeCallback, PlainModule]:
    landscape = LossLandscapeCallback(**SMALL, trajectory=True, check_curvatures=False, **options)
    module = PlainModule()
    module.body.requires_grad_(trained[0])
    trainer(Switch(*trained), landscape, max_epochs=len(trained)).fit(module, loader())
    return landscape, module


def test_layers_that_are_unfrozen_later_are_in_the_trajectory() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trajectory.*")
        landscape, module = fitted(False, False, True)
    plane = landscape.results["train"].trajectory
    assert plane is not None and plane.trajectory is not None
    assert plane.trajectory.labels == ("start", "epoch 0", "epoch 1", "epoch 2")
    assert plane.trajectory.distances[-1] == 0
    start, *_ = (torch.cat([p.flatten() for p in s.values()]) for s in landscape._history._states.values())
    end = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert plane.trajectory.distances[0] == pytest.approx((start - end).norm().item(), rel=1e-5)


def test_layers_that_are_frozen_at_the_end_are_omitted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"omits \d parameters that moved, such as 'body\.0\.weight'"):
        landscape, module = fitted(True, True, False)
    plane = landscape.results["train"].trajectory
    assert plane is not None and plane.trajectory is not None
    state = landscape._history._states["start"]
    moved = [state[name] - p.detach() for name, p in module.named_parameters() if name.startswith("head")]
    distance = torch.cat([step.flatten() for step in moved]).norm().item()
    assert plane.trajectory.distances[0] == pytest.approx(distance, rel=1e-5)


def test_parameters_that_are_frozen_at_the_start_do_not_end_the_training() -> None:
    landscape, _ = fitted(True, True, params=["body", "head"])
    assert landscape.results["train"].trajectory is not None


def test_one_epoch_gives_a_line_and_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"loss_landscape/train: no trajectory: states: .* got a line\. One epoch"):
        landscape, _ = fitted(True)
    result = landscape.results["train"]
    assert result.trajectory is None and result.plane is not None and not result.partial


def test_no_epoch_gives_a_warning() -> None:
    landscape = LossLandscapeCallback(**SMALL, trajectory=True)
    with pytest.warns(UserWarning, match="no trajectory: states: expected at least two, got 1"):
        trainer(landscape, max_epochs=0).fit(PlainModule(), loader())
    assert landscape.results["train"].plane is not None
