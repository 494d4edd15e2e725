"""The trajectory of a run in which layers are frozen, unfrozen, added, or that is too short for a plane."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from moe_heads.callbacks import LossLandscapeCallback
from moe_heads.callbacks.landscape_trail import WeightTrail
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


def test_layers_that_are_unfrozen_on_the_way_are_in_the_trajectory() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trajectory.*")
        landscape, module = fitted(False, False, True)
    plane = landscape.results["train"].trajectory
    assert plane is not None and plane.trajectory is not None
    assert plane.trajectory.labels == ("start", "epoch 0", "epoch 1", "epoch 2")
    assert plane.trajectory.distances[-1] == 0
    start, *_ = (torch.cat([p.flatten() for p in s.values()]) for s in landscape._trail._states.values())
    end = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert plane.trajectory.distances[0] == pytest.approx((start - end).norm().item(), rel=1e-5)


def test_layers_that_are_frozen_in_the_end_are_left_out_and_told() -> None:
    with pytest.warns(UserWarning, match=r"leaves out \d parameters that moved, such as 'body\.0\.weight'"):
        landscape, module = fitted(True, True, False)
    plane = landscape.results["train"].trajectory
    assert plane is not None and plane.trajectory is not None
    state = landscape._trail._states["start"]
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


def test_what_does_not_move_is_not_copied() -> None:
    model, trail = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), WeightTrail(None)
    trail.remember("start", model)
    with torch.no_grad():
        model[1].weight.add_(1)
    trail.remember("end", model)
    first, last = trail._states.values()
    assert [first[name] is last[name] for name in first] == [True, True, False, True]
    with torch.no_grad():
        model[0].weight.zero_()
    assert bool(first["0.weight"].any())


def test_parameters_that_come_later_are_left_out() -> None:
    model, trail = nn.Sequential(nn.Linear(2, 2)), WeightTrail(None)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if step == 1:
            model.append(nn.Linear(2, 1))
        trail.remember(str(step), model)
    with pytest.warns(UserWarning, match=r"run: the trajectory leaves out 2 .* such as '1\.weight'"):
        plane, names = trail.plane(model, "run")
    assert names == ["0.weight", "0.bias"] and len(plane.direction1) == 6
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient was there all along"):
        trail.plane(model, "run")


def test_a_shared_parameter_is_meant_by_any_of_its_names() -> None:
    model, trail = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), WeightTrail(["1"])
    model[1].weight = model[0].weight
    trail.remember("start", model)
    assert list(trail._states["start"]) == ["0.weight", "1.bias"]
