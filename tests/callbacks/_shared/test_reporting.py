"""Reports of results to the loggers."""

import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from moe_heads.callbacks import AnalysisInputs, FitEndAnalysis, Mesh, Report
from moe_heads.callbacks._shared import reporting
from moe_heads.callbacks._shared.reporting import _to_mlflow, log_report
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, loader, trainer
from tests.support.sources import ROOT

TABLE = "# text\n\n| module | p50 ms |\n|---|---|\n| head | 1.5 |"


class Everything(FitEndAnalysis):
    name = "everything"

    def compute(self, inputs: AnalysisInputs) -> float:
        return 0.25

    def report(self, result: float) -> Report:
        triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
        mesh = Mesh(triangle, torch.tensor([[[0, 1, 2]]]), torch.zeros(1, 3, 3, dtype=torch.uint8))
        metrics = {"value": result, "blocks.0.head/batch1/p50_ms": 1.5}
        files = {"blocks.0.head/data.json": b"[0.25]", "arrays/points.npz": b"PK"}
        figures = {"blocks.0.head/figure": Figure()}
        return Report(metrics, {"summary": TABLE}, figures, {"surface": mesh}, files)


class EveryEpoch(Everything):
    """Also reports during training, each epoch one more number."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = self.report(float(trainer.current_epoch))
        extra = {f"epoch{trainer.current_epoch}": 1.0}
        log_report(
            trainer.loggers,
            "during",
            Report({**report.metrics, **extra}, report.texts, report.figures),
            trainer.global_step,
        )


class Recorder(Logger):
    """A logger of an unknown class."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """No place for them."""


class FullDisk(Recorder):
    """Fails when an analysis reports; what Lightning logs in training is not ours to guard."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "everything/train/value" in metrics:
            raise OSError(28, "No space left on device")


def rows(logger: CSVLogger, key: str) -> list[tuple[int, float]]:
    """Step and value of a key in metrics.csv."""
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row[key]]


def test_everything_reaches_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"seed": 3, "shape": (1, 2), "nothing": None})
    trainer(Everything(splits=["train"]), logger=logger).fit(PlainModule(), loader())
    logger.experiment.flush()
    events = read_events(Path(logger.log_dir))
    assert [(e.step, e.value) for e in events.Scalars("everything/train/value")] == [(3, 0.25)]
    assert "everything/train/summary/text_summary" in events.Tags()["tensors"]
    assert "everything/train/blocks.0.head/figure" in events.Tags()["images"]
    assert {f"everything/train/surface_{part}" for part in ("VERTEX", "FACE", "COLOR")} <= set(events.Tags()["tensors"])
    text = events.Tensors("everything/train/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Samples: 40 of 40, drawn with seed 0" in text
    assert Path(logger.log_dir, "everything/train/blocks.0.head/data.json").read_bytes() == b"[0.25]"


def test_hparams_are_one_row_a_run_without_a_list_of_columns(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"seed": 3, "shape": (1, 2), "nothing": None})
    first, second = Everything(splits=["train"]), Everything(splits=["train"], name="again")
    trainer(first, second, logger=logger).fit(PlainModule(), loader())
    logger.experiment.flush()
    events = read_events(Path(logger.log_dir))
    metadata = {tag: events.SummaryMetadata(tag) for tag in events.PluginTagToContent("hparams")}
    assert set(metadata) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    start = metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"seed" in start
    assert b"(1, 2)" in start
    assert b"nothing" not in start


def test_the_placeholder_metric_is_warned_about(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="default_hp_metric=False"):
        trainer(Everything(splits=["train"]), logger=logger).fit(PlainModule(), loader())


def test_csv_holds_what_comes_during_training_and_at_its_end(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(EveryEpoch(splits=["train"]), logger=logger, max_epochs=3).fit(PlainModule(), loader())
    assert rows(logger, "during/value") == [(3, 0.0), (6, 1.0), (9, 2.0)]
    assert rows(logger, "during/epoch2") == [(9, 1.0)]
    assert rows(logger, "everything/train/value") == [(9, 0.25)]
    assert Path(logger.log_dir, "everything/train/blocks.0.head/data.json").read_bytes() == b"[0.25]"
    assert [step for step, _ in rows(logger, "loss")] == list(range(9))


def test_csv_is_on_disk_before_the_loggers_are_finalized(tmp_path: Path) -> None:
    class Looking(Everything):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_fit_end(trainer, pl_module)
            assert rows(trainer.loggers[0], "everything/train/value") == [(3, 0.25)]

    trainer(Looking(splits=["train"]), logger=CSVLogger(tmp_path)).fit(PlainModule(), loader())


def test_every_logger_gets_the_numbers_known_or_not(tmp_path: Path) -> None:
    tensorboard, table, unknown = TensorBoardLogger(tmp_path, default_hp_metric=False), CSVLogger(tmp_path), Recorder()
    loggers: list[Any] = [unknown, tensorboard, table]
    trainer(Everything(splits=["train"]), logger=loggers).fit(PlainModule(), loader())
    key = "everything/train/value"
    assert [(e.step, e.value) for e in read_events(Path(tensorboard.log_dir)).Scalars(key)] == [(3, 0.25)]
    assert rows(table, key) == [(3, 0.25)]
    assert [(step, found[key]) for step, found in unknown.logged if key in found] == [(3, 0.25)]


def test_a_logger_that_fails_costs_nothing_else(tmp_path: Path) -> None:
    table, analysis = CSVLogger(tmp_path), Everything(splits=["train"], on_error="raise")
    fitted = trainer(analysis, logger=[FullDisk(), table])
    with pytest.warns(UserWarning, match=r"everything/train: FullDisk failed with OSError: .*No space left") as caught:
        fitted.fit(PlainModule(), loader())
    assert sum("FullDisk" in str(warning.message) for warning in caught) == 1
    assert rows(table, "everything/train/value") == [(3, 0.25)]
    assert fitted.callback_metrics["everything/train/value"] == 0.25
    assert analysis.results == {"train": 0.25}


def test_a_row_of_hparams_that_fails_is_only_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "write_hparams", full)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    with pytest.warns(UserWarning, match=r"HPARAMS: TensorBoardLogger failed with OSError"):
        trainer(Everything(splits=["train"], on_error="raise"), logger=logger).fit(PlainModule(), loader())


def test_fast_dev_run_takes_any_logger(tmp_path: Path) -> None:
    fitted = trainer(Everything(splits=["train"], on_error="raise"), logger=CSVLogger(tmp_path), fast_dev_run=True)
    fitted.fit(PlainModule(), loader())
    assert fitted.callback_metrics["everything/train/value"] == 0.25


def test_wandb_gets_numbers_images_and_panels(wandb_run: WandbLogger, tmp_path: Path) -> None:
    table, tensorboard = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb", default_hp_metric=False)
    analysis = EveryEpoch(splits=["train"], on_error="raise")
    trainer(analysis, logger=[wandb_run, table, tensorboard], max_epochs=2).fit(PlainModule(), loader())
    run = wandb_run.experiment
    summary = dict(run.summary)
    assert summary["everything/train/value"] == 0.25
    assert summary["everything/train/blocks.0.head/batch1/p50_ms"] == 1.5
    assert summary["during/value"] == 1.0
    assert summary["trainer/global_step"] == 6
    run.finish()
    media = Path(run.dir) / "media"
    # nothing is dropped: a file an epoch, and those of the end of fit
    assert len(list(media.glob("images/during/blocks.0.head/figure_*.png"))) == 2
    assert len(list(media.glob("images/everything/train/blocks.0.head/figure_*.png"))) == 1
    assert len(list(media.glob("html/during/summary_*.html"))) == 2
    (panel,) = media.glob("html/everything/train/summary_*.html")
    assert "<h1>text</h1>" in panel.read_text()
    assert "<td>head</td>" in panel.read_text()
    assert rows(table, "everything/train/value") == [(6, 0.25)]


def test_files_are_in_the_folders_of_the_loggers(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb", default_hp_metric=False)]
    trainer(Everything(splits=["train"], on_error="raise"), logger=loggers).fit(PlainModule(), loader())
    for logger in loggers:
        assert Path(logger.log_dir, "everything", "train", "arrays", "points.npz").read_bytes() == b"PK"


def test_mlflow_is_given_the_files_as_artifacts() -> None:
    """As its client is called, where MLflow is not installed."""
    given: dict[str, bytes] = {}

    class Client:
        def log_artifacts(self, run_id: str, local_dir: str) -> None:
            files = [path for path in Path(local_dir).rglob("*") if path.is_file()]
            given.update({f"{run_id}/{path.relative_to(local_dir)}": path.read_bytes() for path in files})

    write = _to_mlflow
    report = Report(files={"arrays/points.npz": b"PK", "page.html": b"<p>"})
    write(SimpleNamespace(experiment=Client(), run_id="run"), "everything/train", report, 0)
    folder = "run/everything/train"
    assert given == {f"{folder}/arrays/points.npz": b"PK", f"{folder}/page.html": b"<p>"}


def test_mlflow_gets_numbers_and_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="not a dev dependency, for its thirty packages: install mlflow-skinny")
    # MLflow keeps its store of plain files, the only one of mlflow-skinny, behind this switch
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=(tmp_path / "store").as_uri())
    table, analysis = CSVLogger(tmp_path / "csv"), EveryEpoch(splits=["train"], on_error="raise")
    trainer(analysis, logger=[logger, table], max_epochs=2).fit(PlainModule(), loader())
    client, run_id = logger.experiment, logger.run_id

    def history(key: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))

    assert history("during/value") == [(3, 0.0), (6, 1.0)]
    assert history("everything/train/value") == [(6, 0.25)]
    assert history("everything/train/blocks.0.head/batch1/p50_ms") == [(6, 1.5)]
    folder = Path(client.download_artifacts(run_id, "everything/train"))
    assert (folder / "arrays" / "points.npz").read_bytes() == b"PK"
    assert (folder / "summary.md").read_text().startswith(TABLE)
    assert (folder / "blocks.0.head" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "blocks.0.head" / "data.json").read_bytes() == b"[0.25]"
    assert rows(table, "everything/train/value") == [(6, 0.25)]


def test_importing_the_callbacks_imports_no_logger_library() -> None:
    code = "import sys, moe_heads.callbacks; assert sys.modules.keys().isdisjoint({'wandb', 'mlflow'})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)


def test_no_logger_is_fine() -> None:
    fitted = trainer(Everything(splits=["train"]))
    fitted.fit(PlainModule(), loader())
    assert fitted.callback_metrics["everything/train/value"] == 0.25
