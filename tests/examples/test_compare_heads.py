"""The study at small size: folders, report, resumption, and invalid options before training."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.events import read_events
from tests.support.sources import ROOT

SMALL = (
    *("--heads", "dense", "sparse", "--seeds", "1", "--epochs", "1", "--limit-train", "64"),
    *("--analysis-samples", "20", "--plane-points", "3"),
)


def compare(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own, as people do."""
    command = [sys.executable, str(ROOT / "examples" / "compare_heads.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], int]:
    """The script's main function, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    import compare_heads

    return compare_heads.main


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("study")
    return folder, compare(*SMALL, folder=folder)


def test_a_study_runs_to_the_end_and_prints_the_path_of_the_report(
    study: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = study
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "[2/2] sparse, seed 0: test accuracy" in result.stdout
    assert "tensorboard --logdir runs/digits" in result.stdout
    assert "generalization gap" in (folder / "runs" / "digits" / "report.md").read_text()


def test_every_analysis_is_in_the_event_files(study: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out = study[0] / "runs" / "digits"
    tags = read_events(out / "sparse" / "seed0").Tags()
    assert {"test/accuracy", "sharpness/test/trace", "expert_utilization/epoch/head/load_0"} <= set(tags["scalars"])
    assert {"loss_landscape/train/plane", "expert_utilization/train/head/classes"} <= set(tags["images"])
    assert "loss_landscape/train/surface_VERTEX" in tags["tensors"]
    assert "_hparams_/session_start_info" in read_events(out / "dense" / "seed0").PluginTagToContent("hparams")
    assert "_hparams_/experiment" in read_events(out).PluginTagToContent("hparams")


def test_results_and_the_reports_pictures_are_written(study: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out = study[0] / "runs" / "digits"
    results = json.loads((out / "results.json").read_text())["runs"]
    assert [(result["head"], result["seed"]) for result in results] == [("dense", 0), ("sparse", 0)]
    assert abs(results[0]["capacity"]["total"] / results[1]["capacity"]["total"] - 1) < 0.05
    report = (out / "report.md").read_text()
    pictures = [line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(pictures) >= 6
    assert all((out / picture).stat().st_size > 1000 for picture in pictures)


def test_resume_skips_finished_runs_and_a_second_start_needs_it(
    study: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(study[0])
    main = script(monkeypatch)
    assert main(SMALL) == 2
    assert "expected a folder without runs" in capsys.readouterr().err
    assert main([*SMALL, "--resume", "--epochs", "2"]) == 2
    assert "was made with epochs=1 (now 2)" in capsys.readouterr().err
    assert main([*SMALL, "--resume"]) == 0
    assert capsys.readouterr().out.count("already finished") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "--data: expected digits, cifar10 or imagefolder:PATH, got 'mnist'"),
        (["--data", "imagefolder:nowhere"], "got 'nowhere', which does not exist"),
        (["--heads", "dense", "quantum"], "--heads: expected some of dense, soft, sparse, hard, got quantum"),
        (["--seeds", "0"], "--seeds: expected an integer of at least 1, got 0"),
        (["--learning-rate", "-1"], "--learning-rate: expected a finite number above 0, got -1.0"),
        (["--plane-points", "2"], "--plane-points: expected 3 to 256, got 2"),
        (["--max-minutes", "0"], "--max-minutes: expected a finite number above 0, got 0.0"),
        (["--whiten"], "--whiten: expected --backbone fast_cnn, got digits_cnn"),
        (["--out", "file/below"], "--out: expected a writable folder"),
        (["--head-width", "1", "--heads", "sparse"], "total: expected a number of parameters"),
        (["--backbone", "resnet9"], "resnet9"),
        (["--accelerator", "abacus"], "--accelerator: expected an available accelerator, got 'abacus'"),
    ],
)
def test_invalid_options_raise_an_error_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch)(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:sharpness/test. interrupted")
def test_ctrl_c_in_an_analysis_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    mine = tmp_path / "runs" / "digits" / "events.out.tfevents.123.mine"
    mine.touch()
    main = script(monkeypatch)
    monkeypatch.setattr("moe_heads.callbacks.sharpness.sharpness", interrupt)
    monkeypatch.setattr("signal.signal", lambda *handler: None)  # Lightning is deaf to Ctrl-C from here on
    with pytest.warns(UserWarning, match="sharpness/train: interrupted"):
        assert main([*SMALL, "--heads", "dense"]) == 130
    assert "interrupted. Finished parts are kept. Continue with --resume." in capsys.readouterr().err
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("loss_landscape.json"))  # no other analysis was begun
    assert mine.exists()


def test_a_damaged_result_is_reported_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "digits" / "dense" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"head')
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch)([*SMALL, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "seed0/result.json is damaged" in error and "Remove the file" in error


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path: Path) -> None:
    """The whole of `make demo`: six runs, and accuracies that say that training worked."""
    result = compare(folder=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "runs" / "digits" / "results.json").read_text())["runs"]
    assert len(results) == 6
    assert all(result["metrics"]["test/accuracy"] > 0.93 for result in results)
    assert all(result["metrics"]["sharpness/train/residual_max"] <= 1e-3 for result in results)
