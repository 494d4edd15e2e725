"""A checkpoint on the command line against the callback under a Trainer."""

import json
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_heads.callbacks import FitEndAnalysis, SharpnessCallback
from moe_heads.cli import main
from moe_heads.commands.analyze import AnalyzeOptions, analyze_checkpoint
from tests.support.checkpoint_models import Model, data, loss

MODULE = "tests.support.checkpoint_models"
ARGUMENTS: dict[str, dict[str, Any]] = {"sharpness": {"num_samples": 20, "num_eigenvalues": 1, "splits": ["test"]}}

Trained = tuple[Path, dict[str, FitEndAnalysis]]


def command(ckpt: Path, out: Path, *more: str, model: str = "build", data: str = "data") -> list[str]:
    names = ["--model", f"{MODULE}:{model}", "--data", f"{MODULE}:{data}"]
    return ["analyze", "--ckpt", str(ckpt), *names, "--out", str(out), *more]


def test_the_numbers_are_those_of_the_callback_under_a_trainer(trained: Trained, tmp_path: Path) -> None:
    """Bit for bit; the stability threshold alone needs an optimizer."""
    path, callbacks = trained
    options = [
        "--sharpness.num_samples",
        "20",
        "--sharpness.num_eigenvalues",
        "1",
        "--loss_landscape.num_samples",
        "20",
    ]
    options += ["--loss_landscape.line_points", "3", "--loss_landscape.plane_points", "3"]
    options += ["--loss_landscape.splits", "[train]"]
    options += ["--expert_utilization.num_samples", "20"]
    names = "sharpness,loss_landscape,expert_utilization"
    assert main(command(path, tmp_path / "out", "--analyses", names, *options, model="Model", data="Data")) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for name, callback in callbacks.items():
        assert set(result["analyses"][name]) == set(callback.results) >= {"train"}
        for split, found in result["analyses"][name].items():
            expected = dict(callback.report(callback.results[split]).metrics)
            expected.pop("stability_threshold", None)
            assert found["metrics"] == expected


def test_everything_that_identifies_the_run_is_stored(trained: Trained, tmp_path: Path) -> None:
    path, _ = trained
    options = AnalyzeOptions(str(path), f"{MODULE}:build", f"{MODULE}:data", str(tmp_path / "out"), "sharpness")
    out = analyze_checkpoint(options, ARGUMENTS).folder
    result = json.loads((out / "result.json").read_text())
    assert result["checkpoint"] == {
        "path": str(path.resolve()),
        "sha256": sha256(path.read_bytes()).hexdigest(),
        "unpickled": [],
    }
    assert result["model"]["name"] == f"{MODULE}:build" and len(result["model"]["weights_sha256"]) == 64
    assert result["data"] == f"{MODULE}:data" and result["machine"]["device_type"] == "cpu"
    assert result["versions"]["torch"] == version("torch")
    assert result["options"]["sharpness"] == ARGUMENTS["sharpness"]
    found = result["analyses"]["sharpness"]["test"]
    assert found["errors"]["trace"] >= found["metrics"]["trace_stderr"]
    assert (out / "sharpness/test/summary.md").read_text().startswith("| quantity")
    assert (out / "sharpness/test/spectrum.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(out / "sharpness/test/spectrum.npz") as arrays:
        assert arrays["eigenvalues"][0] == found["metrics"]["lambda_max"]
        assert arrays["values"].shape == arrays["grid"].shape
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


def test_a_loss_by_import_name_is_used(trained: Trained, tmp_path: Path) -> None:
    options = ["--sharpness.num_samples", "20", "--sharpness.density", "false", "--sharpness.splits", "[test]"]
    assert main(command(trained[0], tmp_path / "out", "--loss", f"{MODULE}:loss", *options, model="build_loaded")) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["analyses"]["sharpness"]
    model = Model.load_from_checkpoint(trained[0], weights_only=True)
    callback = SharpnessCallback(num_samples=20, density=False, loss_fn=loss)
    expected = callback.analyze(model, test=data()["test"])["test"]
    assert found["test"]["metrics"]["lambda_max"] == pytest.approx(expected.eigenvalues[0], rel=1e-5)
    assert list(found) == ["test"]


def test_a_single_loader_is_training_data(trained: Trained, tmp_path: Path) -> None:
    assert main(command(trained[0], tmp_path / "out", "--analyses", "expert_utilization", data="one_loader")) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["analyses"]
    assert list(found["expert_utilization"]) == ["train"]


def test_a_failure_leaves_nothing_behind(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, inputs: object) -> None:
        raise ValueError("the analysis failed")

    monkeypatch.setattr(SharpnessCallback, "compute", fail)
    assert main(command(trained[0], tmp_path / "out")) == 2
    assert "the analysis failed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_results_of_the_other_analyses_are_kept_after_a_failure(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, inputs: object) -> None:
        raise RuntimeError("the analysis failed")

    monkeypatch.setattr(SharpnessCallback, "compute", fail)
    assert main(command(trained[0], tmp_path / "out", "--analyses", "sharpness,expert_utilization")) == 1
    output = capsys.readouterr()
    assert "moe-heads: sharpness failed: the analysis failed" in output.err and str(tmp_path / "out") in output.out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["analyses"]) == {"expert_utilization"}
    assert result["failed"] == {"sharpness": "failed with RuntimeError: the analysis failed"}
    assert not (tmp_path / "out" / "sharpness").exists()


def test_earlier_results_are_replaced_only_on_request(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("earlier")
    options = ["--analyses", "expert_utilization"]
    assert main(command(trained[0], tmp_path / "out", *options)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_text() == "earlier"
    assert main(command(trained[0], tmp_path / "out", *options, "--overwrite")) == 0
    assert (tmp_path / "out" / "result.json").read_text() != "earlier"
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "names", "message"),
    [
        (["--analyses", "sharpnes"], {}, "--analyses: expected some of sharpness, .* got 'sharpnes'"),
        (["--analyses", ""], {}, "--analyses: .* got none"),
        ([], {"model": "nothing"}, "--model: expected an object of the module .* got 'nothing'"),
        ([], {"model": "F"}, "--model: expected a class with load_from_checkpoint, or a function"),
        ([], {"model": "build_number"}, "--model: expected .*build_number to return a torch.nn.Module, got int"),
        (
            [],
            {"model": "build_wide"},
            r"got one of another model: of another shape: first.weight \(6, 5\) instead of \(7, 5\), .* more",
        ),
        ([], {"data": "unlabeled"}, "--data: expected train batches with which the loss .* which has no labels"),
        ([], {"data": "wrong_splits"}, "--data: expected a mapping with some of train, val, test, got"),
        ([], {"data": "MODULE"}, "--data: expected an object of the module"),
        (["--sharpness.num_samples", "0"], {}, "num_samples: expected an integer of at least 1, got 0"),
        (["--sharpness.num_samples", "many"], {}, "--sharpness.num_samples: expected int or null, got many"),
        (["--sharpness.samples", "4"], {}, "unrecognized arguments: --sharpness.samples"),
        (["--device", "gpu"], {}, "--device: expected a device of this machine, got 'gpu'"),
        (["--loss_landscape.seed", "1"], {}, "--loss_landscape.seed: expected an option of an analysis that runs"),
        (["--loss", "x"], {}, "--loss: expected module:object"),
        (["--loss", "no_such_module:x"], {}, "--loss: expected a module that can be imported"),
        (["--ckpt", "missing.ckpt"], {}, "--ckpt: expected a file, got 'missing.ckpt'"),
        (["--ckpt", __file__], {}, "--ckpt: expected a checkpoint of torch"),
    ],
)
def test_an_error_is_one_sentence_and_status_2(
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    names: dict[str, str],
    message: str,
) -> None:
    assert main(command(trained[0], tmp_path / "out", *more, **names)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^moe-heads: .*{message}", line), line
    assert not list(tmp_path.iterdir())
