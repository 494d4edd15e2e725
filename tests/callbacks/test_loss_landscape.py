"""The options of the loss landscape callback, from a fit to what is in the logger's folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, loader, trainer

SMALL: dict[str, Any] = {"splits": ["train"], "line_points": 5, "plane_points": 3, "on_error": "raise"}


class Accurate(PlainModule):
    def analysis_accuracy(self, batch: Any) -> Tensor:
        return (self(batch[0]).argmax(-1) == batch[1]).float().mean()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fit with all that can be asked for."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    landscape = LossLandscapeCallback(
        **SMALL, num_directions=3, trajectory=True, refine=2, html=True, resume=str(folder / "points")
    )
    loggers = [TensorBoardLogger(folder / "tb", default_hp_metric=False), CSVLogger(folder / "csv")]
    run = trainer(landscape, logger=loggers, max_epochs=3)
    module = Accurate()
    run.fit(module, loader())
    loggers[0].experiment.flush()
    return {"run": run, "result": landscape.results["train"], "loggers": loggers, "folder": folder, "module": module}


def test_all_parts_are_there(everything: dict[str, Any]) -> None:
    result = everything["result"]
    assert list(result.parts) == ["line", "plane", "trajectory", "sweep"]
    assert result.line.losses.shape == (7,)
    assert len(result.line.checks) == 1 and len(result.plane.checks) == 2
    assert result.line.checks[0].exact == pytest.approx(result.line.checks[0].second_difference, rel=0.5)
    assert result.plane.losses_fixed_routing is not None and result.plane.accuracies is not None
    assert result.sweep.losses.shape == (3, 5)
    assert not result.partial


def test_the_run_ends_at_the_center_of_its_plane(everything: dict[str, Any]) -> None:
    plane = everything["result"].trajectory
    run = plane.trajectory
    assert run.labels == ("start", "epoch 0", "epoch 1", "epoch 2")
    assert run.distances[-1] == 0
    assert run.coordinates[-1].tolist() == [0, 0]
    assert plane.center_loss == everything["result"].plane.center_loss
    for axis, coordinates in zip(plane.axes, run.coordinates.T, strict=True):
        assert axis[0] <= coordinates.min() and coordinates.max() <= axis[-1]


def test_everything_is_in_tensorboard_and_in_its_folder(everything: dict[str, Any]) -> None:
    tensorboard, table = everything["loggers"]
    tags = read_events(Path(tensorboard.log_dir)).Tags()
    parts = ["line", "plane", "trajectory", "sweep"]
    maps = ["plane_flips", "plane_fixed_routing", "plane_accuracy"]
    assert {f"loss_landscape/train/{part}" for part in [*parts, *maps]} <= set(tags["images"])
    assert {
        "loss_landscape/train/line_curvature_1_exact",
        "loss_landscape/train/plane_routing_gap_max",
        "loss_landscape/train/sweep_relative_spread",
        "loss_landscape/train/trajectory_loss_max",
    } <= set(tags["scalars"])
    for logger in (tensorboard, table):
        folder = Path(logger.log_dir) / "loss_landscape" / "train"
        assert sorted(path.name for path in folder.iterdir()) == ["landscape.html", *sorted(f"{p}.npz" for p in parts)]
        with np.load(folder / "plane.npz") as stored:
            assert np.array_equal(stored["losses"], everything["result"].plane.losses.numpy())
        assert "<canvas" in (folder / "landscape.html").read_text()


def test_points_are_kept_where_they_were_asked_for(everything: dict[str, Any]) -> None:
    kept = everything["folder"] / "points" / "loss_landscape" / "train"
    parts = [path.name.partition("_")[0] for path in sorted(kept.iterdir())]
    assert parts == ["eigenvectors", "line", "plane", "trajectory"]


def test_only_the_head_moves_and_the_body_is_computed_once() -> None:
    sharpness = SharpnessCallback(splits=["train"], params=["head"], num_eigenvalues=2)
    landscape = LossLandscapeCallback(**SMALL, params=["head"], plane_directions="eigenvectors")
    trainer(sharpness, landscape).fit(PlainModule(), loader())
    found, spectrum = landscape.results["train"], sharpness.results["train"]
    assert found.line is not None and found.plane is not None
    assert "body" in found.plane.reused
    assert found.plane.direction_norms == pytest.approx((1, 1))
    # taken from the sharpness run: the same eigenvectors, so the same curvatures
    exact = [check.exact for check in found.plane.checks]
    assert exact == pytest.approx(spectrum.eigenvalues[:2], rel=1e-3)


def test_eigenvectors_of_the_same_parameters_are_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.callbacks._landscape_eigenvectors.top_eigenvectors", None)
    landscape = LossLandscapeCallback(**SMALL, params=["head"], plane_directions="eigenvectors")
    trainer(SharpnessCallback(splits=["train"], params=["head"]), landscape).fit(PlainModule(), loader())
    assert landscape.results["train"].plane is not None
    with pytest.raises(TypeError, match="NoneType"):
        trainer(SharpnessCallback(splits=["train"], params=["body"]), landscape).fit(PlainModule(), loader())


def test_eigenvectors_are_those_of_the_same_samples_in_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.callbacks._landscape_eigenvectors.top_eigenvectors", None)
    sharpness, landscape = SharpnessCallback(splits=["train"], batch_size=7), LossLandscapeCallback(**SMALL)
    trainer(sharpness, landscape).fit(PlainModule(), loader())
    assert sharpness.results["train"].num_samples > 7
    assert landscape.results["train"].line is not None


def test_a_trajectory_needs_a_training() -> None:
    landscape = LossLandscapeCallback(**SMALL, trajectory=True, check_curvatures=False)
    with pytest.warns(UserWarning, match="no trajectory, since no training was recorded by this callback"):
        results = landscape.analyze(Accurate(), train=loader())
    assert results["train"].trajectory is None
    assert results["train"].plane.checks == ()


def test_a_wrong_name_is_told_before_training() -> None:
    with pytest.raises(ValueError, match=r"params: expected .* 'tail'"):
        trainer(LossLandscapeCallback(**SMALL, params=["tail"])).fit(PlainModule(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": -1}, "refine: expected an integer of at least 0, got -1"),
        ({"refine": True}, "refine: expected an integer of at least 0, got True"),
        ({"plane_points": 3.0}, r"plane_points: expected an integer of at least 3, got 3\.0"),
        ({"line_reach": "far"}, "line_reach: expected a finite number above 0, got 'far'"),
        ({"plane_reach": True}, "plane_reach: expected a finite number above 0, got True"),
        ({"resume": True}, "resume: expected a folder, got True"),
        ({"resume": __file__}, "resume: expected a folder, got '.*test_loss_landscape.py'"),
        ({"params": "head"}, "params: expected a list of names, got 'head'"),
        ({"resume": ""}, "resume: expected a folder, got ''"),
        ({"num_directions": 1}, "num_directions: expected 0, or at least 2 that can be compared, got 1"),
        ({"plane_directions": "pca"}, "plane_directions: expected one of 'random', 'eigenvectors', got 'pca'"),
        ({"normalization": "weight"}, "normalization: expected one of 'filter', 'layer', 'none', got 'weight'"),
        ({"biases": "kept"}, "biases: expected one of 'zero', 'normalized', got 'kept'"),
        ({"html": 1}, "html: expected True or False, got 1"),
        ({"trajectory": "yes"}, "trajectory: expected True or False, got 'yes'"),
        ({"check_curvatures": None}, "check_curvatures: expected True or False, got None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossLandscapeCallback(**options)
