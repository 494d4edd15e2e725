"""Reports of results to the loggers: metrics to every logger, texts, figures and meshes to those that support them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers import TensorBoardLogger as TrainerTensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from markdown import markdown

from moe_heads.callbacks._shared.custom_scalars import Charts, write_charts
from moe_heads.callbacks._shared.lightning_packages import under_both_names
from moe_heads.callbacks._shared.trainer_access import has_default_hp_metric, write_hparams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Mesh", "Report", "log_charts", "log_figures", "log_hparams", "log_report"]

# W&B shows HTML without any style, so the columns of a table would run into each other.
_HTML_STYLE = "<style>body {font-family: sans-serif} td, th {padding: 2px 8px; text-align: left}</style>"


@dataclass(frozen=True)
class Mesh:
    """A surface for TensorBoard's mesh plugin: vertices (1, V, 3), faces (1, F, 3), colors (1, V, 3) uint8."""

    vertices: torch.Tensor
    faces: torch.Tensor
    colors: torch.Tensor


@dataclass(frozen=True)
class Report:
    """Outputs of one analysis of one split by name; names are joined to ``<analysis>/<split>/<name>``.

    Attributes:
        metrics: Numbers.
        texts: Texts in Markdown.
        figures: Matplotlib figures.
        meshes: Surfaces.
        files: Contents of machine-readable files, such as JSON.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)
    meshes: Mapping[str, Mesh] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def keyed(self, prefix: str) -> dict[str, float]:
        """Return the metrics by their whole keys, below ``<analysis>/<split>``."""
        return {f"{prefix}/{name}": float(value) for name, value in self.metrics.items()}


def log_report(loggers: Iterable[Logger], prefix: str, report: Report, step: int) -> None:
    """Write the metrics to every logger, and the rest to loggers that support it. To be called on rank zero.

    - TensorBoard: texts, figures and meshes under their keys; files as ``<key>`` in its folder, overwritten by later
      steps.
    - CSV: files, likewise.
    - W&B: figures as images, texts as HTML panels; no meshes and files.
    - MLflow: figures, texts and files as the artifacts ``<key>.png``, ``<key>.md`` and ``<key>``, overwritten by later
      steps; no meshes.
    - Any other logger: metrics only.

    A logger that raises an error causes a warning and may lack a part of the report. The other loggers are not
    affected.

    Args:
        loggers: The loggers, of a Trainer or of Fabric.
        prefix: ``<analysis>/<split>``.
        report: The report.
        step: Step of all outputs.
    """
    for logger in loggers:
        with _errors_as_warning(logger, prefix):
            logger.log_metrics(report.keyed(prefix), step=step)
            # write to disk now: the next analysis may take long, and a killed run never finalizes its loggers
            logger.save()
            _log_media(logger, prefix, report, step)


def log_figures(loggers: Iterable[Logger], prefix: str, draw: "Callable[[], Mapping[str, Figure]]", step: int) -> None:
    """Write figures during training if a logger shows figures. An error only causes a warning.

    Args:
        loggers: The loggers.
        prefix: ``<analysis>/<place>``.
        draw: Function that draws the figures, by name.
        step: Step of the figures.
    """
    kinds = under_both_names(TensorBoardLogger, WandbLogger, MLFlowLogger)
    showing = [logger for logger in loggers if isinstance(logger, kinds)]
    if not showing:
        return
    try:
        report = Report(figures=draw())
    except Exception as error:
        rank_zero_warn(f"{prefix}: the figures failed with {type(error).__name__}: {error}\nThe training continues.")
        return
    for logger in showing:
        with _errors_as_warning(logger, prefix):
            _log_media(logger, prefix, report, step)


def log_charts(loggers: Iterable[Logger], title: str, charts: Charts) -> None:
    """Add a group of charts to the page of custom scalars of every TensorBoard logger.

    Args:
        loggers: The loggers.
        title: Title of the group. A group with the same title is replaced.
        charts: The charts by title.
    """
    for logger in loggers:
        if isinstance(logger, under_both_names(TensorBoardLogger)):
            with _errors_as_warning(logger, f"{title}: custom scalars"):
                write_charts(logger.experiment, logger.log_dir, title, charts)


@contextmanager
def _errors_as_warning(logger: Logger, what: str) -> Iterator[None]:
    """Turn errors of a logger into warnings, so that a full disk or a network failure affects no other output."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(
            f"{what}: {type(logger).__name__} failed with {type(error).__name__}: {error}\nIt may lack a part of this"
            " report. The other loggers and the results of the callback are not affected."
        )


def _log_media(logger: Logger, prefix: str, report: Report, step: int) -> None:
    """Write texts, figures, meshes and files; do nothing for classes of loggers that are not listed here."""
    writers: dict[type[Logger], _MediaWriter] = {
        TensorBoardLogger: _to_tensorboard,
        CSVLogger: _to_folder,
        WandbLogger: _to_wandb,
        MLFlowLogger: _to_mlflow,
    }
    for cls, write in writers.items():
        if isinstance(logger, under_both_names(cls)):
            write(logger, prefix, report, step)


_MediaWriter = Callable[[Any, str, Report, int], None]


def _to_tensorboard(logger: TensorBoardLogger, prefix: str, report: Report, step: int) -> None:
    writer = logger.experiment
    for name, text in report.texts.items():
        writer.add_text(f"{prefix}/{name}", text, step)
    for name, figure in report.figures.items():
        writer.add_figure(f"{prefix}/{name}", figure, step)
    for name, mesh in report.meshes.items():
        writer.add_mesh(f"{prefix}/{name}", mesh.vertices, colors=mesh.colors, faces=mesh.faces, global_step=step)
    _write_files(logger.log_dir, prefix, report)


def _to_folder(logger: CSVLogger, prefix: str, report: Report, step: int) -> None:
    _write_files(logger.log_dir, prefix, report)


def _to_wandb(logger: WandbLogger, prefix: str, report: Report, step: int) -> None:
    # everything through the logger, which logs the step as a metric: W&B drops data with a step below its own counter
    from wandb import Html

    for name, text in report.texts.items():
        panel: Any = Html(_HTML_STYLE + markdown(text, extensions=["tables"]))
        logger.log_metrics({f"{prefix}/{name}": panel}, step)
    for name, figure in report.figures.items():
        logger.log_image(f"{prefix}/{name}", [figure], step)


def _to_mlflow(logger: MLFlowLogger, prefix: str, report: Report, step: int) -> None:
    client, run_id = logger.experiment, logger.run_id
    for name, text in report.texts.items():
        client.log_text(run_id, text, f"{prefix}/{name}.md")
    for name, figure in report.figures.items():
        client.log_figure(run_id, figure, f"{prefix}/{name}.png")
    with TemporaryDirectory() as folder:
        _write_files(folder, prefix, report)
        if report.files:
            client.log_artifacts(run_id, folder)


def _write_files(folder: str, prefix: str, report: Report) -> None:
    for name, content in report.files.items():
        path = Path(folder, prefix, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@rank_zero_only
def log_hparams(loggers: Iterable[Logger]) -> None:
    """Write one row of TensorBoard's HPARAMS table: the logger's hyperparameters next to all its scalars."""
    for logger in loggers:
        if not isinstance(logger, under_both_names(TrainerTensorBoardLogger)):
            continue
        if has_default_hp_metric(logger):
            rank_zero_warn(
                "TensorBoardLogger: expected default_hp_metric=False, got True, so TensorBoard's HPARAMS table cannot"
                " show the analyses of this run. Pass TensorBoardLogger(..., default_hp_metric=False)."
            )
        else:
            with _errors_as_warning(logger, "HPARAMS"):
                write_hparams(logger, _scalars(dict(logger.hparams)))


def _scalars(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Convert hyperparameters that the table does not support to text."""
    return {
        name: value if isinstance(value, (bool, str, int, float)) else repr(value)
        for name, value in hparams.items()
        if value is not None
    }
