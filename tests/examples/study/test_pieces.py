"""A study in several processes: interrupted, changed, and run in parallel."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study.run
import torch
from PIL import Image
from study.storage import claimed

from moe_heads.callbacks import ExpertUtilizationCallback, FitEndAnalysis, InferenceTimingCallback
from moe_heads.lightning_modules import MoEClassifier

SMALL = (
    *("--heads", "sparse", "--seeds", "1", "--epochs", "3", "--limit-train", "64"),
    *("--analysis-samples", "20", "--plane-points", "3", "--schedule", "linear", "--channels-last"),
)
ONE_EPOCH = ("--epochs", "1")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:expert_utilization. epoch"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict"),
]


@pytest.fixture(autouse=True)
def _fewer_analyses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One analysis, since what is tested is what happens around them."""
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr("study.run.analyses_of", lambda options, folder: [ExpertUtilizationCallback()])


def main(folder: Path, *arguments: str, base: Sequence[str] = SMALL) -> int:
    import compare_heads

    return compare_heads.main([*base, "--out", str(folder), *arguments])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sparse" / "seed0" / "result.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "sparse" / "seed0" / "checkpoints" / "last.ckpt"
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def test_pieces_make_the_same_run_as_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path / "whole") == 0
    pieces = tmp_path / "pieces"
    warned = []
    for _ in range(4):
        assert main(pieces, "--resume", "--max-minutes", "1e-9") == 3
        warned.append(capsys.readouterr().err.strip().splitlines()[-1])
        assert not list(pieces.rglob("result.json"))
    assert (
        "trained 1 of 3 epochs" in warned[0] and "trained 2 of 3 epochs" in warned[1] and "to be analyzed" in warned[2]
    )
    assert "trained, and analyzed up to expert_utilization" in warned[3]
    assert main(pieces, "--resume", "--max-minutes", "1e-9") == 0
    whole, parts = weights(tmp_path / "whole"), weights(pieces)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    metrics = result(tmp_path / "whole")["metrics"]
    assert result(pieces)["metrics"] == pytest.approx(metrics)
    assert result(pieces)["loads"] == result(tmp_path / "whole")["loads"]
    assert result(pieces)["training_seconds"] > 0
    assert not (pieces / "sparse" / "seed0" / "analyses").exists()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """A second analysis, and which of the two computed, in their order."""
    seen: list[str] = []
    for kind in (ExpertUtilizationCallback, InferenceTimingCallback):

        def compute(self: Any, inputs: Any, original: Any = kind.compute) -> Any:
            seen.append(f"{self.name}/{inputs.split}")
            return original(self, inputs)

        monkeypatch.setattr(kind, "compute", compute)

    def analyses(options: Any, folder: Path) -> list[FitEndAnalysis]:
        return [ExpertUtilizationCallback(), InferenceTimingCallback(batch_sizes=[1], splits=["test"])]

    monkeypatch.setattr("study.run.analyses_of", analyses)
    return seen


def test_an_analysis_that_is_done_is_not_repeated(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as failing, pytest.warns(UserWarning, match="inference_timing/test: failed"):
        failing.setattr(InferenceTimingCallback, "compute", lambda self, inputs: 1 / 0)
        assert main(tmp_path, *ONE_EPOCH) == 1
    assert "the run lacks inference_timing. Start again" in capsys.readouterr().err
    assert computed == ["expert_utilization/train", "expert_utilization/test"]
    computed.clear()
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0
    assert computed == ["inference_timing/test"]
    found = result(tmp_path)
    assert found["loads"].keys() == {"train", "test"}
    assert {name.partition("/")[0] for name in found["metrics"]} >= {"expert_utilization", "inference_timing"}
    pictures = [path.name for path in (tmp_path / "sparse" / "seed0").glob("*.png")]
    assert any(name.startswith("expert_utilization") for name in pictures)


@pytest.mark.slow
def test_what_was_found_on_other_weights_is_not_taken(tmp_path: Path, computed: list[str]) -> None:
    for _ in range(2):
        assert main(tmp_path, *ONE_EPOCH, "--resume", "--max-minutes", "1e-9") == 3
    (kept,) = tmp_path.rglob("expert_utilization.json")
    stale = json.loads(kept.read_text())
    kept.write_text(json.dumps(stale | {"weights": "of another training", "loads": {}}))
    computed.clear()
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0
    assert computed == ["expert_utilization/train", "expert_utilization/test", "inference_timing/test"]
    assert result(tmp_path)["loads"] == stale["loads"]


@pytest.mark.slow
def test_what_another_machine_has_found_is_not_taken(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result names one machine: times of one and curvature of another would pass for what it is not."""
    for _ in range(2):
        assert main(tmp_path, *ONE_EPOCH, "--resume", "--max-minutes", "1e-9") == 3
    monkeypatch.setattr("study.machine._processor", lambda: "another one")
    computed.clear()
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0
    assert computed == ["expert_utilization/train", "expert_utilization/test", "inference_timing/test"]
    assert result(tmp_path)["machine"]["name"] == "another one"


def test_an_analysis_that_fails_when_time_is_up_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More pieces would fail in the same way: the loop of pieces has to end."""
    assert main(tmp_path, *ONE_EPOCH, "--max-minutes", "1e-9") == 3
    monkeypatch.setattr(ExpertUtilizationCallback, "compute", lambda self, inputs: 1 / 0)
    with pytest.warns(UserWarning, match="expert_utilization/(train|test): failed"):
        assert main(tmp_path, *ONE_EPOCH, "--resume", "--max-minutes", "1e-9", "--seeds", "2") == 1
    assert "the run lacks expert_utilization" in capsys.readouterr().err


def test_an_analysis_whose_report_fails_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be missing for good."""
    with monkeypatch.context() as failing, pytest.warns(UserWarning, match="failed with ValueError: no room"):

        def no_room(self: ExpertUtilizationCallback, result: Any) -> None:
            raise ValueError("no room")

        failing.setattr(ExpertUtilizationCallback, "report", no_room)
        assert main(tmp_path, *ONE_EPOCH) == 1
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0
    assert "expert_utilization/test/head/effective_experts" in result(tmp_path)["metrics"]


@pytest.mark.slow
def test_a_damaged_analysis_is_reported_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(tmp_path, *ONE_EPOCH, "--resume", "--max-minutes", "1e-9") == 3
    (kept,) = tmp_path.rglob("expert_utilization.json")
    kept.write_text(kept.read_text()[:50])
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 1
    assert "expert_utilization.json is damaged" in (error := capsys.readouterr().err) and "Remove it to repeat" in error
    kept.unlink()
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0


def test_the_preset_for_a_cpu_on_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    data = ("--preset", "cpu", "--data", f"imagefolder:{tmp_path / 'images'}", "--resume")
    few = ("--heads", "sparse", "--seeds", "1", "--epochs", "2", "--batch-size", "8")
    assert main(tmp_path / "out", "--max-minutes", "1e-9", base=[*data, *few]) == 3
    assert main(tmp_path / "out", base=[*data, *few]) == 0
    assert "a folder of images (.jpg files of 2 classes)" in (tmp_path / "out" / "report.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_a_half_done_run_is_not_carried_on_with_other_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path, "--max-minutes", "1e-9") == 3
    assert main(tmp_path, "--resume", "--learning-rate", "0.3") == 2
    assert "config.json was made with learning_rate=0.1 (now 0.3)" in capsys.readouterr().err
    assert main(tmp_path) == 2
    assert "expected a folder without runs" in capsys.readouterr().err


def test_different_images_in_the_same_folder_raise_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(tmp_path) == 0
    monkeypatch.setattr("moe_heads.lightning_modules.digits._TEST_SHARE", 0.3)
    assert main(tmp_path, "--resume") == 2
    assert "was made with data_sha256=" in capsys.readouterr().err


def test_a_diverged_run_keeps_no_other_from_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = study.run.build_model

    def diverging(options: Any, head: str, data: Any) -> Any:
        model = build(options, head, data)
        if head == "dense":
            torch.nn.init.constant_(next(model.head.parameters()), float("nan"))
        return model

    monkeypatch.setattr("study.run.build_model", diverging)
    assert main(tmp_path, "--heads", "dense", "sparse") == 1
    assert "[1/2] dense, seed 0: " in (error := capsys.readouterr().err) and "nan or infinity" in error
    assert "Runs: 1 sparse." in (tmp_path / "report.md").read_text()


def test_a_damaged_checkpoint_is_reported_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path, "--max-minutes", "1e-9") == 3
    last = tmp_path / "sparse" / "seed0" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert main(tmp_path, "--resume") == 1
    assert "last.ckpt is damaged" in (error := capsys.readouterr().err) and "Remove it" in error
    last.unlink()
    assert main(tmp_path, "--resume") == 0


@pytest.mark.slow
def test_the_report_is_about_all_runs_of_the_folder(tmp_path: Path) -> None:
    assert main(tmp_path) == 0
    assert main(tmp_path, "--resume", "--heads", "dense") == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["head"], run["seed"]) for run in runs] == [("dense", 0), ("sparse", 0)]


def test_another_head_with_different_options_raises_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path) == 0
    assert main(tmp_path, "--resume", "--heads", "dense", "--learning-rate", "0.3") == 2
    assert "was made with learning_rate=0.1 (now 0.3)" in capsys.readouterr().err


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(tmp_path / "sparse" / "seed0"):
        assert main(tmp_path, "--resume") == 3
    assert "another process is working on it" in capsys.readouterr().out
    assert not list(tmp_path.rglob("result.json"))


def test_a_full_disk_fails_the_run_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("study.run.replace", full)
    assert main(tmp_path) == 1
    assert "No space left on device" in (error := capsys.readouterr().err) and "result.json" in error


def test_a_damaged_config_is_reported_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sparse" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"backbone"')
    assert main(tmp_path, "--resume") == 2
    error = capsys.readouterr().err
    assert "seed0/config.json is damaged" in error and "Remove its folder" in error


@pytest.mark.slow
def test_an_incomplete_result_is_reported_and_its_training_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path, *ONE_EPOCH) == 0
    path, before = tmp_path / "sparse" / "seed0" / "result.json", result(tmp_path)
    path.write_text(json.dumps({"config": before["config"]}))
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 2
    assert "result.json without head, seed, capacity" in (error := capsys.readouterr().err)
    assert "Remove the file; the training is kept" in error
    path.unlink()
    monkeypatch.setattr(MoEClassifier, "training_step", lambda *args: pytest.fail("trained again"))
    assert main(tmp_path, *ONE_EPOCH, "--resume") == 0
    assert result(tmp_path)["metrics"]["plain/test/loss"] == before["metrics"]["plain/test/loss"]


def test_a_folder_of_one_class_is_reported_as_an_error_of_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    assert main(tmp_path / "runs", "--data", f"imagefolder:{tmp_path / 'images'}") == 2
    assert "error: --data: expected at least two class folders" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
