"""From a result to every logger of the trainer: numbers to all, figures, tables and meshes to TensorBoard."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from moe_heads.callbacks.trainer_access import write_hparams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Mesh", "Report", "log_hparams", "log_report"]


@dataclass(frozen=True)
class Mesh:
    """A surface for TensorBoard's mesh plugin: vertices (1, V, 3), faces (1, F, 3), colours (1, V, 3) uint8."""

    vertices: torch.Tensor
    faces: torch.Tensor
    colors: torch.Tensor


@dataclass(frozen=True)
class Report:
    """What one analysis of one split says, by name; names are joined to ``<analysis>/<split>/<name>``.

    Attributes:
        metrics: Numbers.
        texts: Markdown.
        figures: Matplotlib figures.
        meshes: Surfaces.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)
    meshes: Mapping[str, Mesh] = field(default_factory=dict)


def log_report(trainer: Trainer, prefix: str, report: Report) -> None:
    """Write a report: numbers into ``trainer.callback_metrics`` and all loggers, the rest into TensorBoard.

    Args:
        trainer: The trainer.
        prefix: ``<analysis>/<split>``.
        report: The report.
    """
    metrics = {f"{prefix}/{name}": float(value) for name, value in report.metrics.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            _log_to_tensorboard(logger.experiment, prefix, report, trainer.global_step)


def _log_to_tensorboard(writer: Any, prefix: str, report: Report, step: int) -> None:
    for name, text in report.texts.items():
        writer.add_text(f"{prefix}/{name}", text, step)
    for name, figure in report.figures.items():
        writer.add_figure(f"{prefix}/{name}", figure, step)
    for name, mesh in report.meshes.items():
        writer.add_mesh(f"{prefix}/{name}", mesh.vertices, colors=mesh.colors, faces=mesh.faces, global_step=step)


@rank_zero_only
def log_hparams(trainer: Trainer) -> None:
    """One row of TensorBoard's HPARAMS table: the hyper-parameters that the logger was told, beside all its scalars."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        if logger._default_hp_metric:
            rank_zero_warn(
                "TensorBoardLogger wrote its placeholder hp_metric, so TensorBoard's HPARAMS table cannot show the"
                " analyses of this run. Pass TensorBoardLogger(..., default_hp_metric=False)."
            )
        else:
            write_hparams(logger, _scalars(dict(logger.hparams)))


def _scalars(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that the table can hold; anything else as text."""
    return {
        name: value if isinstance(value, (bool, str, int, float)) else repr(value)
        for name, value in hparams.items()
        if value is not None
    }
