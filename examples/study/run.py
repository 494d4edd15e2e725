"""One run of the study: train, test, analyse, store; carried on where an earlier piece ended."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moe_heads import capacity
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from moe_heads.lightning_modules import ImageDataModule, MoEClassifier, RandomStates
from moe_heads.lightning_modules.data import Split
from study.build import build_model, precision_of
from study.machine import describe_machine
from study.options import Options
from study.storage import replace
from study.training import LAST, Deadline, TrainingClock, checked, checkpoints, missing


def run(
    options: Options,
    head: str,
    seed: int,
    data: ImageDataModule,
    config: dict[str, Any],
    deadline: float,
    show_progress: bool,
) -> dict[str, Any]:
    """Train and analyse one head with one seed; events, checkpoint and ``result.json`` go into the run's folder.

    Args:
        options: Of the study.
        head: Name of the head.
        seed: Of weights, order and augmentation.
        data: Data module with its images loaded.
        config: What the result says that it was made with.
        deadline: `time.monotonic` after which nothing new is begun.
        show_progress: Show bars.

    Returns:
        What is stored in ``result.json``.

    Raises:
        TimeIsUp: When the deadline is over before the run is; what is done is kept.
        RuntimeError: If an analysis could not be finished.
    """
    folder = options.run_dir(head, seed)
    pl.seed_everything(seed, verbose=False)
    model = build_model(options, head, data)
    last = folder / "checkpoints" / LAST
    logger = TensorBoardLogger(options.out, name=head, version=folder.name, default_hp_metric=False)
    logger.log_hyperparams({"seed": seed, "data": options.data.partition(":")[0]})
    clock, gate = TrainingClock(), Deadline(deadline)
    analyses = _analyses(options)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        precision=precision_of(options),
        logger=logger,
        callbacks=[gate, *analyses, clock, RandomStates(), checkpoints(last.parent)],
        enable_progress_bar=show_progress,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data, ckpt_path=checked(last) if last.exists() else None)
    if undone := missing(analyses):
        raise RuntimeError(f"{folder}: not finished, for want of {', '.join(undone)}; start again with --resume")
    # of the trained model only: what was logged while training is not known to the piece that analyses
    found = tuple(f"{analysis.name}/{split}/" for analysis in analyses for split in analysis.results)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(found)}
    metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    analysis_seconds = time.perf_counter() - gate.fit_ended
    model.to(trainer.strategy.root_device)  # the Trainer has taken it back to the CPU
    for split in get_args(Split):
        metrics |= _evaluated(model, data, split)
    logger.finalize("success")
    size = capacity(model.head)
    if seed == 0:
        _save_figures(folder, analyses)
    result = {
        "head": head,
        "seed": seed,
        "config": config,
        "capacity": {"total": size.total, "active": size.active, "backbone": _num_parameters(model.backbone)},
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "lines": _lines(analyses),
        "loads": _loads(analyses),
        "training_seconds": clock.seconds,
        "analysis_seconds": analysis_seconds,
        "machine": describe_machine(trainer),
    }
    # written last: a run without it is not finished
    replace(folder / "result.json", json.dumps(result, indent=1))
    return result


def _analyses(options: Options) -> list[FitEndAnalysis]:
    analysed = {"num_samples": options.analysis_samples}
    return [
        SharpnessCallback(engine=options.engine, **analysed),
        LossLandscapeCallback(plane_points=options.plane_points, **analysed),
        ExpertUtilizationCallback(),
        InferenceTimingCallback(),
    ]


@torch.no_grad()
def _evaluated(model: MoEClassifier, data: ImageDataModule, split: Split) -> dict[str, float]:
    """Loss and accuracy on a whole split as it is, in fp32: what a gap between splits is made of."""
    model.eval()
    losses, hits, count = 0.0, 0, 0
    for images, labels in DataLoader(data.analysis_dataset(split), batch_size=500):
        logits = model(images.to(model.device)).float()
        labels = labels.to(model.device)
        losses += float(F.cross_entropy(logits, labels, reduction="sum"))
        hits += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {f"plain/{split}/loss": losses / count, f"plain/{split}/accuracy": hits / count}


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lines(analyses: Sequence[FitEndAnalysis]) -> dict[str, dict[str, list[float | None]]]:
    """Loss along the top eigenvector by split, and with the routing held fixed, for the comparison of the heads."""
    landscape = next(analysis for analysis in analyses if isinstance(analysis, LossLandscapeCallback))
    lines = {}
    for split, result in landscape.results.items():
        if result.line is None:
            continue
        columns = {
            "alphas": result.line.alphas,
            "losses": result.line.losses,
            "losses_fixed_routing": result.line.losses_fixed_routing,
            "routing_flips": result.line.routing_flips,
        }
        lines[split] = {name: _finite(values.tolist()) for name, values in columns.items() if values is not None}
    return lines


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in values]


def _loads(analyses: Sequence[FitEndAnalysis]) -> dict[str, dict[str, list[float]]]:
    """Hard load and importance of every expert of the head, by split."""
    callback = next(analysis for analysis in analyses if isinstance(analysis, ExpertUtilizationCallback))
    return {
        split: {"load": found.load.tolist(), "importance": found.importance.tolist()}
        for split, result in callback.results.items()
        for found in result.heads.values()
    }


def _save_figures(folder: Path, analyses: Sequence[FitEndAnalysis]) -> None:
    """The figures of the training split as files, for the report, which shows those of the first seed."""
    for analysis in analyses:
        result = next((analysis.results[split] for split in ("train", "test") if split in analysis.results), None)
        for name, figure in {} if result is None else analysis.report(result).figures.items():
            figure.savefig(folder / f"{analysis.name}_{name.replace('/', '_')}.png", dpi=150)
