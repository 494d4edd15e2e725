"""From a result to the loggers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure

from moe_heads.callbacks import AnalysisInputs, FitEndAnalysis, Mesh, Report
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, loader, trainer


class Everything(FitEndAnalysis):
    name = "everything"

    def compute(self, inputs: AnalysisInputs) -> float:
        return 0.25

    def report(self, result: float) -> Report:
        triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
        mesh = Mesh(triangle, torch.tensor([[[0, 1, 2]]]), torch.zeros(1, 3, 3, dtype=torch.uint8))
        return Report({"value": result}, {"summary": "# text"}, {"figure": Figure()}, {"surface": mesh})


def test_everything_reaches_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"seed": 3, "shape": (1, 2), "nothing": None})
    trainer(Everything(splits=["train"]), logger=logger).fit(PlainModule(), loader())
    logger.experiment.flush()
    events = read_events(Path(logger.log_dir))
    assert [(e.step, e.value) for e in events.Scalars("everything/train/value")] == [(3, 0.25)]
    assert "everything/train/summary/text_summary" in events.Tags()["tensors"]
    assert "everything/train/figure" in events.Tags()["images"]
    assert {f"everything/train/surface_{part}" for part in ("VERTEX", "FACE", "COLOR")} <= set(events.Tags()["tensors"])
    text = events.Tensors("everything/train/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Samples: 40 of 40, drawn with seed 0" in text


def test_hparams_are_one_row_a_run_without_a_list_of_columns(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"seed": 3, "shape": (1, 2), "nothing": None})
    first, second = Everything(splits=["train"]), Everything(splits=["train"])
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


def test_several_loggers_get_the_numbers(tmp_path: Path) -> None:
    loggers: list[Any] = [TensorBoardLogger(tmp_path / "tb", default_hp_metric=False), CSVLogger(tmp_path / "csv")]
    trainer(Everything(splits=["train"]), logger=loggers).fit(PlainModule(), loader())
    loggers[1].save()
    assert "everything/train/value" in (Path(loggers[1].log_dir) / "metrics.csv").read_text()


def test_no_logger_is_fine() -> None:
    fitted = trainer(Everything(splits=["train"]))
    fitted.fit(PlainModule(), loader())
    assert fitted.callback_metrics["everything/train/value"] == 0.25
