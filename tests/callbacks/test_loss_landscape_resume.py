"""One folder of points for all that goes on: trainings, epochs and callbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_heads.callbacks import LossLandscapeCallback
from tests.support.lightning_models import PlainModule, loader, trainer

SMALL: dict[str, Any] = {"splits": ["train"], "line_points": 5, "plane_points": 3, "on_error": "raise"}


def trained(*callbacks: LossLandscapeCallback, seed: int = 0, epochs: int = 2) -> PlainModule:
    torch.manual_seed(seed)
    module = PlainModule()
    trainer(*callbacks, max_epochs=epochs).fit(module, loader())
    return module


def files(folder: Path, part: str, name: str = "loss_landscape") -> set[str]:
    return {path.name for path in (folder / name / "train").glob(f"{part}_*.npz")}


@pytest.mark.slow
def test_every_epoch_training_and_callback_has_its_own_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "resume": str(tmp_path), "trajectory": True}
    tracked = LossLandscapeCallback(**options, every_n_epochs=1)
    other = LossLandscapeCallback(**options, name="other", seed=1)
    trained(tracked, other)
    assert tracked.results["train"].trajectory is not None and len(tracked.tracked["train"]) == 2
    # the last epoch is the end of fit
    assert len(files(tmp_path, "line")) == len(files(tmp_path, "plane")) == len(files(tmp_path, "eigenvectors")) == 2
    assert len(files(tmp_path, "line", "other")) == 1
    trained(LossLandscapeCallback(**options), seed=1)
    assert len(files(tmp_path, "line")) == len(files(tmp_path, "plane")) == 3
    trained(LossLandscapeCallback(**options, params=["head"]), seed=1)
    assert len(files(tmp_path, "line")) == len(files(tmp_path, "plane")) == 4


def test_a_run_of_the_same_goes_on_along_the_same_eigenvector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**SMALL, "resume": str(tmp_path), "plane_directions": "eigenvectors"}
    first = LossLandscapeCallback(**options)
    trained(first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    # what another process would compute differs by rounding
    monkeypatch.setattr("moe_heads.callbacks._landscape_eigenvectors.top_eigenvectors", None)
    second = LossLandscapeCallback(**options)
    trained(second)
    assert {*before} == {*tmp_path.rglob("*.npz")}
    one, two = (callback.results["train"] for callback in (first, second))
    assert torch.equal(one.line.losses, two.line.losses) and torch.equal(one.plane.losses, two.plane.losses)
    assert one.line.direction_norms == two.line.direction_norms


def test_a_loss_that_looks_the_same_and_is_not_is_refused(tmp_path: Path) -> None:
    def scaled(scale: float) -> Any:
        return lambda model, batch: scale * torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    options: dict[str, Any] = {**SMALL, "resume": str(tmp_path)}
    trained(LossLandscapeCallback(**options, loss_fn=scaled(1.0)))
    with pytest.raises(ValueError, match=r"resume: expected the same loss_fn, .* at the center"):
        trained(LossLandscapeCallback(**options, loss_fn=scaled(2.0)))
    other = LossLandscapeCallback(**options, loss_fn=lambda m, b: 2 * torch.nn.functional.cross_entropy(m(b[0]), b[1]))
    trained(other)
    assert other.results["train"].line is not None and len(files(tmp_path, "line")) == 2


def test_damaged_eigenvectors_are_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "resume": str(tmp_path)}
    trained(LossLandscapeCallback(**options))
    (file,) = tmp_path.rglob("eigenvectors_*.npz")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"resume: expected a file that loss_landscape wrote, got .*{file.name}"):
        trained(LossLandscapeCallback(**options))
    (line,) = tmp_path.rglob("line_*.npz")
    file.write_bytes(line.read_bytes())
    with pytest.raises(ValueError, match=r"got .*'eigenvectors'"):
        trained(LossLandscapeCallback(**options))
