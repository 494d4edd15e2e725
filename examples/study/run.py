"""One run of the study: train, test, analyze and store, resumed from an earlier process."""

import json
import math
from typing import Any, get_args

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moe_heads import capacity
from moe_heads.lightning_modules import ImageDataModule, MoEClassifier, RandomStates
from moe_heads.lightning_modules.data import Split
from study.analyses import AnalysisCheckpoint, analyses_of, folder_of, remove_saved, saved_in
from study.build import build_model, device_of, precision_of
from study.machine import describe_machine
from study.options import Options
from study.storage import replace
from study.training import LAST, Deadline, TimeIsUp, TrainingClock, checkpoints, read_weights


def run(
    options: Options,
    head: str,
    seed: int,
    data: ImageDataModule,
    config: dict[str, Any],
    deadline: float,
    show_progress: bool,
) -> dict[str, Any]:
    """Train and analyze one head with one seed, and write events, checkpoint and ``result.json`` to the run's folder.

    Args:
        options: Options of the study.
        head: Name of the head.
        seed: Seed of weights, order and augmentation.
        data: Data module with loaded images.
        config: Options that are stored in the result.
        deadline: `time.monotonic` after which no epoch or analysis is started.
        show_progress: Whether to show progress bars.

    Returns:
        The content of ``result.json``.

    Raises:
        TimeIsUp: If the deadline ends the run early; finished parts are kept.
        RuntimeError: If an analysis failed, or a file of an earlier process is damaged.
    """
    folder = options.run_dir(head, seed)
    pl.seed_everything(seed, verbose=False)
    model = build_model(options, head, data)
    last = folder / "checkpoints" / LAST
    machine = describe_machine(device_of(options), precision_of(options))
    saved = folder_of(folder, machine)
    before = saved_in(saved, read_weights(last)) if last.exists() else {}
    logger = TensorBoardLogger(options.out, name=head, version=folder.name, default_hp_metric=False)
    logger.log_hyperparams({"seed": seed, "data": options.data.partition(":")[0]})
    clock, limit = TrainingClock(), Deadline(deadline)
    figures = folder if seed == 0 else None
    analyses = analyses_of(options, saved)
    savers = [AnalysisCheckpoint(one, limit, saved, figures) for one in analyses if one.name not in before]
    analyzing = [callback for saver in savers for callback in (saver.analysis, saver)]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        precision=precision_of(options),
        logger=logger,
        callbacks=[limit, *analyzing, clock, RandomStates(), checkpoints(last.parent)],
        enable_progress_bar=show_progress,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    except TimeIsUp:
        # a failed analysis is reported below: more time would not help
        if not any(saver.has_failed for saver in savers):
            raise
    found = saved_in(saved, model.state_dict())
    if missing := [analysis.name for analysis in analyses if analysis.name not in found]:
        raise RuntimeError(f"{folder}: the run lacks {', '.join(missing)}. Start again with --resume.")
    metrics = {name: value for analysis in found.values() for name, value in analysis["metrics"].items()}
    metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    model.to(trainer.strategy.root_device)  # the Trainer has moved it to the CPU
    for split in get_args(Split):
        metrics |= _evaluated(model, data, split)
    logger.finalize("success")
    size = capacity(model.head)
    result = {
        "head": head,
        "seed": seed,
        "config": config,
        "capacity": {"total": size.total, "active": size.active, "backbone": _num_parameters(model.backbone)},
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "lines": {split: line for analysis in found.values() for split, line in analysis["lines"].items()},
        "loads": {split: load for analysis in found.values() for split, load in analysis["loads"].items()},
        "training_seconds": clock.seconds,
        "analysis_seconds": sum(analysis["seconds"] for analysis in found.values()),
        "machine": machine,
    }
    # written last: a run without this file is unfinished
    replace(folder / "result.json", json.dumps(result, indent=1))
    remove_saved(folder)
    return result


@torch.no_grad()
def _evaluated(model: MoEClassifier, data: ImageDataModule, split: Split) -> dict[str, float]:
    """Return loss and accuracy on a whole split without augmentation, in fp32."""
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
