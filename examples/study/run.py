"""One run of the study: build, train, test, analyse, store."""

import json
import time
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from moe_heads import Dense, Head, capacity, match_capacity
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from moe_heads.lightning_modules import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    MoEClassifier,
    build_backbone,
)
from study.options import Options


def build_data(options: Options) -> ImageDataModule:
    """Data module of the options, its images loaded: what is wrong with them shows before anything is written."""
    kind, _, path = options.data.partition(":")
    shared: dict[str, Any] = {"batch_size": options.batch_size, "limit_train": options.limit_train}
    data: ImageDataModule
    if kind == "digits":
        data = DigitsDataModule(**shared)
    elif kind == "cifar10":
        data = CIFAR10DataModule(**shared)
    else:
        data = ImageFolderDataModule(path, image_size=options.image_size, **shared)
    data.prepare_data()
    data.setup()
    return data


def check_accelerator(options: Options) -> None:
    """Refuse an accelerator that this machine has not."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    try:
        pl.Trainer(accelerator=options.accelerator, devices=1, logger=False, **quiet)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(f"--accelerator: cannot train on {options.accelerator!r} here: {error}") from error


def build_model(options: Options, head: str, data: ImageDataModule) -> MoEClassifier:
    """Classifier with a head whose total parameters equal those of the dense head of ``head_width`` units."""
    channels, height, _ = data.image_shape
    backbone = build_backbone(options.backbone, channels, height)
    features = int(backbone.num_features)
    # as in the study, 512 units for 512 features; below 128 eight experts of equal total would have a few units each
    dense = Dense(features, data.num_classes, width=options.head_width or max(128, features))
    return MoEClassifier(backbone, _matched(head, dense), learning_rate=options.learning_rate)


def _matched(head: str, dense: Dense) -> Head:
    sizes = (dense.in_features, dense.num_classes)
    total = capacity(dense).total
    match head:
        case "dense":
            return dense
        case "soft":
            return match_capacity("soft", *sizes, total=total, tolerance=0.05)
        case "sparse":
            return match_capacity("sparse", *sizes, total=total, tolerance=0.05)
        case "hard":
            return match_capacity("sparse", *sizes, total=total, tolerance=0.05, k=1)
    raise AssertionError(head)


def run(options: Options, head: str, seed: int, data: ImageDataModule, show_progress: bool) -> dict[str, Any]:
    """Train and analyse one head with one seed; events, checkpoint and ``result.json`` go into the run's folder."""
    started = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    model = build_model(options, head, data)
    folder = options.run_dir(head, seed)
    logger = TensorBoardLogger(options.out, name=head, version=folder.name, default_hp_metric=False)
    logger.log_hyperparams({"seed": seed, "data": options.data.partition(":")[0]})
    analysed = {"num_samples": options.analysis_samples}
    analyses: list[FitEndAnalysis] = [
        SharpnessCallback(**analysed),
        LossLandscapeCallback(plane_points=options.plane_points, **analysed),
        ExpertUtilizationCallback(),
        InferenceTimingCallback(),
    ]
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val/accuracy", mode="max")
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        logger=logger,
        callbacks=[*analyses, checkpoint],
        enable_progress_bar=show_progress,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    logger.finalize("success")
    missing = [
        analysis.name
        for analysis in analyses
        if set(analysis.results) != set(analysis.splits) or any(r.partial for r in analysis.results.values())
    ]
    if missing:
        raise RuntimeError(f"{folder}: not finished, for want of {', '.join(missing)}; start again with --resume")
    size = capacity(model.head)
    result = {
        "head": head,
        "seed": seed,
        "config": options.config(),
        "capacity": {"total": size.total, "active": size.active},
        "metrics": metrics,
        "lines": _lines(analyses),
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
    }
    if seed == 0:
        _save_figures(folder, analyses)
    # written last: a run without it is not finished
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(folder / "result.json")
    return result


def _lines(analyses: list[FitEndAnalysis]) -> dict[str, dict[str, list[float]]]:
    """Loss along the top eigenvector by split, for the report's comparison of the heads."""
    landscape = next(analysis for analysis in analyses if isinstance(analysis, LossLandscapeCallback))
    return {
        split: {"alphas": result.line.alphas.tolist(), "losses": result.line.losses.tolist()}
        for split, result in landscape.results.items()
        if result.line is not None
    }


def _save_figures(folder: Any, analyses: list[FitEndAnalysis]) -> None:
    """The figures of the training split as files, for the report, which shows those of the first seed."""
    for analysis in analyses:
        result = analysis.results.get("train")
        for name, figure in {} if result is None else analysis.report(result).figures.items():
            figure.savefig(folder / f"{analysis.name}_{name.replace('/', '_')}.png", dpi=110)
